"""Which layers of a model can be pruned in place, and why the others cannot."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from offpath.convert.prune.layer import Layer, has_own_forward, is_prunable
from offpath.nn.filters import FilterFn, check_filter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PACKED = "the projections of its inputs are parameters of its own and no layers; unpack_attention(model) makes some"
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def choose(model: nn.Module, filter_fn: FilterFn | None, by_inputs: bool) -> tuple[list[Layer], list[tuple[str, str]]]:
    """The layers that can be pruned, in the model's order; (name, reason) of those that are left alone.

    Raises `ValueError`, naming the layer, for a weight that is NaN or infinite, without memory, or frozen by
    inference mode, and for a model that gets its sizes from its first input, which a look at inputs would be.
    """
    check_filter(filter_fn)
    shared = _sharing_memory(model)
    layers, skipped = [], []
    for name, module in model.named_modules():
        if by_inputs:
            _check_sizes(name, module)
        if filter_fn is None and isinstance(module, nn.MultiheadAttention):
            skipped.append((name, PACKED))
        converted = _converted(module)
        if not (converted or is_prunable(module)) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        reason = converted or _obstacle(module, shared)
        if reason is None and by_inputs and has_own_forward(module):
            reason = (
                "its own forward may change its inputs before they meet its weight; magnitude and random can prune it"
            )
        if reason:
            skipped.append((name, reason))
        else:
            _check(name, module.weight)
            layers.append(Layer(name, module))
    return layers, skipped


def unreached_reason(layer: Layer) -> str:
    """Why a layer is left alone that is not called while the model runs over the calibration data."""
    if isinstance(layer.module, NonDynamicallyQuantizableLinear):  # what nn.MultiheadAttention has for its outputs
        return (
            "its nn.MultiheadAttention reads its weight instead of calling it; unpack_attention(model) makes it one "
            "that is called, and magnitude and random can prune it"
        )
    return "the calibration data does not reach it"


def _converted(module: nn.Module) -> str | None:
    home = type(module).__module__
    if home.startswith("offpath.nn.") and hasattr(module, "nnz"):
        return "it is sparse already; prune before layers are swapped, or densify the model, prune and compress it"
    if home.startswith(QUANTISED) and (hasattr(module, "in_features") or hasattr(module, "in_channels")):
        return "it is quantised; prune before that"
    return None


def _obstacle(module: nn.Module, shared: set[int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        if parametrize.is_parametrized(module, "weight"):
            return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        if hasattr(module, "weight_mask"):
            return "its weight is computed by a mask; call torch.nn.utils.prune.remove first"
        return "its weight is not a parameter of its own"
    if isinstance(weight, nn.UninitializedParameter):
        return "its sizes are those of its first input; call the model once first"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not plain numbers in floating point"
    if weight.numel() == 0:
        return "it has no weights"
    if id(weight) in shared:
        return "its weight is tied to another module"
    return None


def _check_sizes(name: str, module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"expected layers that have their sizes, got {name!r}, a {type(module).__name__}, which gets them from its "
            "first input; call the model once first"
        )


def _check(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            f"expected weights with values, got layer {name!r} on the meta device; load the model onto a device "
            "first, or leave the layer out with filter_fn"
        )
    if weight.is_inference():
        raise ValueError(
            f"expected weights that may be changed, got those of layer {name!r}, made under torch.inference_mode(); "
            "build the model outside of it"
        )
    if not all(isfinite(extreme) for extreme in torch.aminmax(weight.detach())):
        raise ValueError(f"expected finite weights, got NaN or infinity in layer {name!r}")


def _sharing_memory(model: nn.Module) -> set[int]:
    """Ids of the parameters whose memory another tensor of the model uses too: tied weights, views, expanded ones."""
    spans = []
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided  # type: ignore[union-attr]
            if tensor is not None and plain and tensor.numel() and not tensor.is_meta:
                start = tensor.data_ptr()
                reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                spans.append((str(tensor.device), start, start + (reach + 1) * tensor.element_size(), tensor))
    spans.sort(key=lambda span: span[:2])
    shared = {id(t) for _, _, _, t in spans if any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True))}
    furthest = None
    for span in spans:
        if furthest is not None and span[0] == furthest[0] and span[1] < furthest[2]:
            shared |= {id(span[3]), id(furthest[3])}
        if furthest is None or span[0] != furthest[0] or span[2] > furthest[2]:
            furthest = span
    return shared
