"""Replacing modules inside a model, at every place where they stand, and knowing when not to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

# Modules that read `weight` of the layers in them instead of calling them, in a fast path of their own.
WEIGHT_READERS = (nn.TransformerEncoderLayer,)


def obstacles(model: nn.Module, kind: type[nn.Module], weight: str) -> dict[nn.Module, str]:
    """The modules of `kind` in `model` that cannot be swapped without changing what it computes, and why.

    `weight` is the name of the parameter that a module of `kind` computes with.
    """
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    read = {c for m in model.modules() if isinstance(m, WEIGHT_READERS) for c in m.modules() if c is not m}
    found = {}
    for module in model.modules():
        if isinstance(module, kind):
            reason = _obstacle(module, kind, weight, owners)
            if reason is None and module in read:
                reason = f"an {WEIGHT_READERS[0].__name__} reads its weight instead of calling it"
            if reason:
                found[module] = reason
    return found


def _obstacle(module: nn.Module, kind: type[nn.Module], weight: str, owners: Counter[int]) -> str | None:
    if weight not in module._parameters:
        return f"its {weight} is computed by a mask or parametrization; remove that first"
    if type(module) is not kind:
        return f"it is a {type(module).__name__}, whose owner may read its {weight}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    hooks: list[object] = [v for name, v in vars(module).items() if "_hooks" in name and isinstance(v, dict)]
    for name, parameter in module._parameters.items():
        if parameter is not None and owners[id(parameter)] > 1:
            return f"its {name} is tied to another module"
        hooks += [getattr(parameter, kind_of, None) for kind_of in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    if any(hooks):
        return "it carries hooks, which a new layer would lose"
    return None


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original is a child; a module used in two places stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
