"""What a layer computes with, however it comes to it: a plain parameter, a pruning mask, a parametrization."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

# Hooks that only compute a weight from `weight_orig` and `weight_mask`; what they compute is taken over.
OWN_HOOKS = (BasePruningMethod,)
LINEAR, CONV1D = "Linear", "Conv1D"
CONVOLUTIONS: dict[str, type[nn.Conv1d] | type[nn.Conv2d]] = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d}
Dense = nn.Linear | nn.Conv1d | nn.Conv2d


_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def kind_of(module: nn.Module) -> str | None:
    """ "Linear", "Conv1D", "Conv1d" or "Conv2d", parametrized or not; None for anything else, subclasses included.

    Conv1D is that of Hugging Face transformers: a linear layer whose weight is stored as (in, out).
    """
    kind = parametrize.type_before_parametrizations(module)
    if kind is nn.Linear:
        return LINEAR
    if kind.__name__ == CONV1D and kind.__module__ == "transformers.pytorch_utils":
        return CONV1D
    return next((name for name, convolution in CONVOLUTIONS.items() if kind is convolution), None)


def unknown_source(module: nn.Module) -> str | None:
    """Why what `module` computes with cannot be told; None where it can."""
    for name in ("weight", "bias"):
        if name in module._parameters or _is_masked(module, name) or _is_parametrized(module, name):
            continue
        return f"its {name} is computed by something other than torch's masks and parametrizations; remove that first"
    return None


@torch.no_grad()
def evaluated(module: nn.Module, layer: str, name: str = "weight") -> Tensor | None:
    """The tensor that `module` computes with as its weight or bias; shares memory only with a plain parameter.

    Raises `ValueError`, naming the layer, for a mask that does not have the shape of what it masks.
    """
    if _is_masked(module, name):
        original, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        assert original is not None and mask is not None
        if original.shape != mask.shape:
            raise ValueError(
                f"expected {name}_mask of layer {layer!r} to have the shape of {name}_orig, {tuple(original.shape)}, "
                f"got {tuple(mask.shape)}; mend the mask or leave the layer out with filter_fn"
            )
        return original.detach() * mask
    if _is_parametrized(module, name):
        # A copy: some, such as spectral_norm, change their buffers when they are evaluated.
        computed = deepcopy(module.parametrizations[name]).eval()()  # type: ignore[index, union-attr]
        assert isinstance(computed, Tensor)
        return computed.detach()
    plain = module._parameters[name]
    return None if plain is None else plain.detach()


def stand_in(module: nn.Module, layer: str) -> Dense:
    """The plain layer that computes what `module` does; for Hugging Face's Conv1D, an `nn.Linear`.

    Raises `ValueError` as `evaluated` does.
    """
    weight, bias = _trainable(evaluated(module, layer)), _trainable(evaluated(module, layer, "bias"))
    assert weight is not None
    kind = kind_of(module)
    if kind == CONV1D:
        weight = weight.t()
    plain: Dense
    if kind in CONVOLUTIONS:
        sizes = {name: getattr(module, name) for name in _SIZES}
        plain = CONVOLUTIONS[kind](**sizes, bias=bias is not None, device="meta", dtype=weight.dtype)
    else:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=_requires_grad(module, "weight"))
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=_requires_grad(module, "bias"))
    return plain.train(module.training)


def _trainable(tensor: Tensor | None) -> Tensor | None:
    """A model that was built under `torch.inference_mode` has tensors that can be no parameters outside of it."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _requires_grad(module: nn.Module, name: str) -> bool:
    prefixes = (name, f"{name}_orig", f"parametrizations.{name}.")
    return any(p.requires_grad for key, p in module.named_parameters() if key in prefixes[:2] or prefixes[2] in key)


def _is_masked(module: nn.Module, name: str) -> bool:
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def _is_parametrized(module: nn.Module, name: str) -> bool:
    return parametrize.is_parametrized(module, name)
