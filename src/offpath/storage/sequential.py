"""`nn.Sequential` of layers whose constructors a file can call: those in the table, and sparse ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offpath.convert.swap import attachment
from offpath.nn.watching import Watch
from offpath.storage.contents import Contents
from offpath.storage.errors import StorageError
from offpath.storage.layers import LAYERS, as_json

_CONV = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode"
_POOL = "kernel_size", "stride", "padding"
_NORM = "num_features", "eps", "momentum", "affine", "track_running_stats"
# Class: the arguments of its constructor, each kept as an attribute of the same name.
PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Embedding: (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.MaxPool2d: (*_POOL, "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p",),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope",),
    **dict.fromkeys((nn.Identity, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid), ()),
}
_BY_NAME = {kind.__name__: kind for kind in PLAIN}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What `build` makes `model` of, or None where that would not compute the same.

    So it is where `model` holds a module that is not in the table, one with hooks, a forward or tensors that its class
    does not give it, or one that was changed after it was built.
    """
    return _described(model, "", {})


def build(description: Mapping[str, Any], contents: Contents) -> nn.Module:
    """The modules that `description` names, on the meta device. Raises `StorageError`."""
    try:
        with torch.device("meta"):
            return _built(description, "", contents, {})
    except Exception as error:  # constructors meet whatever a file says
        raise StorageError(f"expected a description of nn.Sequential, got: {error!r:.200}") from error


def _described(module: nn.Module | None, name: str, seen: dict[nn.Module, str]) -> dict[str, Any] | None:
    if module is None or attachment(module, Counter(), own_hooks=(Watch,)):
        return None
    if module in seen:
        return {"same_as": seen[module]}
    seen[module] = name
    kind = type(module)
    if kind is nn.Sequential:
        if module._parameters or module._buffers.keys() - module._non_persistent_buffers_set:
            return None
        # Not named_children: a module that stands in two places is called in both.
        children = {
            child_name: _described(child, f"{name}.{child_name}" if name else child_name, seen)
            for child_name, child in module._modules.items()
        }
        return None if None in children.values() else {"children": children}
    row = LAYERS.get(kind.__name__)
    if row is not None and row.kind is kind:
        return {"stored": kind.__name__}
    if kind not in PLAIN:
        return None
    arguments = {name: _argument(module, name) for name in PLAIN[kind]}
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError):
        return None
    with torch.device("meta"):
        again = kind(**{name: _tupled(value) for name, value in arguments.items()})
    like = same_settings(again, module) and _shapes(again) == _shapes(module)
    return {"class": kind.__name__, "arguments": arguments} if like else None


def same_settings(again: nn.Module, module: nn.Module) -> bool:
    """Whether all that the constructor of `again` has set is so in `module`.

    Whether ReLU and the like write into their input is left out: the result is the same.
    """
    settings = {name for name in vars(again) if not name.startswith("_")} - {"training", "inplace"}
    return all(vars(module).get(name) == vars(again)[name] for name in settings)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict(keep_vars=True).items()}


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" else as_json(value)


def _built(found: Mapping[str, Any], name: str, contents: Contents, made: dict[str, nn.Module]) -> nn.Module:
    if "same_as" in found:
        return made[found["same_as"]]
    if "stored" in found:
        module = contents.layers[name]
    elif "children" in found:
        module = nn.Sequential()
        for child_name, child in found["children"].items():
            full_name = f"{name}.{child_name}" if name else child_name
            module.add_module(child_name, _built(child, full_name, contents, made))
    else:
        kind = _BY_NAME[found["class"]]
        arguments = {key: _tupled(value) for key, value in found["arguments"].items()}
        if arguments.keys() != set(PLAIN[kind]):
            raise StorageError(f"expected {PLAIN[kind]} for {kind.__name__}, got {sorted(arguments)}")
        module = kind(**arguments)
    made[name] = module
    return module


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
