"""Replacing modules inside a model, at every place where they stand, and knowing when not to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from offpath.convert.fused_encoders import fuse_only_dense_encoders
from offpath.convert.readers import read_by_their_owner
from offpath.nn.watching import Watch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # what the kernels compute in


def obstacles(model: nn.Module, kind: type[nn.Module], weight: str) -> dict[nn.Module, str]:
    """The modules of `kind` in `model` that cannot be swapped without changing what it computes, and why.

    `weight` is the name of the parameter that a module of `kind` computes with.
    """
    owners, read = parameter_owners(model), read_by_their_owner(model) if weight == "weight" else {}
    found = {}
    for module in model.modules():
        if isinstance(module, kind):
            reason = _obstacle(module, kind, weight, owners)
            reason = reason or read.get(module)
            if reason:
                found[module] = reason
    return found


def parameter_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, or another one over its memory, by its id."""
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    holders = Counter(map(_place, held))
    return Counter({id(parameter): holders[_place(parameter)] for parameter in held})


def unfit(weight: Tensor) -> str | None:
    """Why no sparse layer can take over what `weight`, without its history, holds."""
    if type(weight) is not Tensor or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}, not a plain dense tensor"
    if weight.dim() < 2 or weight.numel() == 0:
        return f"its weight of shape {tuple(weight.shape)} holds nothing"
    if weight.dtype not in DTYPES:
        return f"no kernel computes in {weight.dtype}; cast the model with .bfloat16() or .float()"
    return None


def subclassed(kind: type[nn.Module], weight: str = "weight") -> str:
    """Why a layer of the class `kind`, derived from one that is known, stays as it is."""
    # What nn.MultiheadAttention has for its outputs, and nothing else in torch.
    step = "; unpack_attention(model) makes it one that is called" if kind is NonDynamicallyQuantizableLinear else ""
    return f"it is a {kind.__name__}, whose owner may read its {weight}{step}"


def attachment(module: nn.Module, owners: Counter[int], own_hooks: tuple[type, ...] = ()) -> str | None:
    """What hangs on `module` and a new layer would lose; hooks of the types `own_hooks` do not count."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for name, parameter in module._parameters.items():
        if parameter is not None and owners[id(parameter)] > 1:
            return f"its {name} is tied to another module"
    hooks = [hook for hook in _hooks(module) if not isinstance(hook, own_hooks)]
    if any(not isinstance(hook, Watch) for hook in hooks):
        return "it carries hooks, which a new layer would lose"
    if _one_watches(hooks, module):
        return "a topology watches it for its next update; call topology.close() first"
    return None


def is_watched(module: nn.Module) -> bool:
    """Whether a topology follows the passes of `module` for its next update."""
    return _one_watches(_hooks(module), module)


def _one_watches(hooks: list[object], module: nn.Module) -> bool:
    return any(isinstance(hook, Watch) and hook.watches(module) for hook in hooks)


def _hooks(module: nn.Module) -> list[object]:
    """Those on the module and its parameters; of a bound method, the object."""
    hooks = [
        hook
        for name, registered in vars(module).items()
        if "_hooks" in name and isinstance(registered, dict)
        for hook in registered.values()
        if callable(hook)  # and not what torch remembers of one
    ]
    for parameter in module._parameters.values():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks += (getattr(parameter, kind, None) or {}).values()
    return [getattr(hook, "__self__", hook) for hook in hooks]


def _obstacle(module: nn.Module, kind: type[nn.Module], weight: str, owners: Counter[int]) -> str | None:
    if weight not in module._parameters:
        return f"its {weight} is computed by a mask or parametrization; remove that first"
    if type(module) is not kind:
        return subclassed(type(module), weight)
    return attachment(module, owners)


def _place(parameter: nn.Parameter) -> object:
    """The same for parameters that begin at one place of memory; a parameter without any is only itself."""
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and not parameter.is_meta
    return (parameter.device, parameter.data_ptr()) if plain and parameter.numel() else id(parameter)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original is a child; a module used in two places stays shared.

    torch's encoders compute fused where all of their layers are dense, and call them elsewhere.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    fuse_only_dense_encoders(model)


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Inside, `model` has the replacements; afterwards, whatever happens, the originals."""
    try:
        swap_modules(model, replacements)
        yield
    finally:
        swap_modules(model, {new: old for old, new in replacements.items()})
