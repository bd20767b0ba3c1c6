"""Which layers of a model are mostly zero and can be swapped, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from offpath.convert.compress.report import too_dense
from offpath.convert.compress.weights import OWN_HOOKS, evaluated, kind_of, unknown_source
from offpath.convert.readers import read_by_their_owner
from offpath.convert.swap import attachment, parameter_owners, subclassed, unfit
from offpath.nn.filters import FilterFn, check_filter
from offpath.nn.sparse_weight import SparseWeightModule

QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.qat")


@dataclass(frozen=True)
class Candidate:
    """A layer that is mostly zero: where it first stands, and its nonzeros."""

    name: str
    module: nn.Module
    kind: str
    nnz: int


def find(
    model: nn.Module, filter_fn: FilterFn | None, min_sparsity: float
) -> tuple[list[Candidate], list[tuple[str, str]], int]:
    """The layers of which at least `min_sparsity` is zero, in the model's order; (name, reason) of those that stay.

    The number is that of the layers that `filter_fn` left out.

    Raises `ValueError`, naming the layer, for one on another device than the CPU, a mask of the wrong shape, and NaN or
    infinity in one that is mostly zero.
    """
    check_filter(filter_fn)
    owners, read = parameter_owners(model), read_by_their_owner(model)
    found, skipped, left_out = [], [], 0
    for name, module in model.named_modules():
        reason = _foreign(module)
        if reason is None and kind_of(module) is None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            left_out += 1
            continue
        reason = reason or _obstacle(module, owners) or read.get(module)
        nnz = 0
        if reason is None:
            weight = evaluated(module, name)
            assert weight is not None
            reason = unfit(weight)
            if reason is None:
                _check_device(weight, name)
                nnz = int(torch.count_nonzero(weight))
                if nnz > (1 - min_sparsity) * weight.numel():
                    reason = too_dense(min_sparsity)
                else:
                    _check_finite(weight, name)
                    _check_finite(evaluated(module, name, "bias"), name, "bias")
        if reason is None:
            kind = kind_of(module)
            assert kind is not None
            found.append(Candidate(name, module, kind, nnz))
        else:
            skipped.append((name, reason))
    return found, skipped, left_out


def _foreign(module: nn.Module) -> str | None:
    """Why `module`, which is a layer but none of torch's dense ones, stays."""
    kind = type(module)
    if isinstance(module, SparseWeightModule):
        return "it is sparse already"
    if kind.__module__.startswith(QUANTISED) and hasattr(module, "weight"):
        return "it is quantised; compress the float model"
    if isinstance(module, nn.Linear) and kind_of(module) is None:
        return subclassed(parametrize.type_before_parametrizations(module))
    return None


def _obstacle(module: nn.Module, owners: Counter[int]) -> str | None:
    reason = unknown_source(module) or attachment(module, owners, OWN_HOOKS)
    if reason is None and getattr(module, "padding_mode", "zeros") != "zeros":
        reason = f"it pads with {module.padding_mode!r}, a sparse convolution with zeros; pad in a layer before it"
    if reason is None and any(owners[id(p)] > 1 for p in module.parameters()):
        return "what its weight is computed from is tied to another module"
    return reason or _companions(module)


def _companions(module: nn.Module) -> str | None:
    """What somebody added to `module` and a new layer would not have."""
    known = {f"{name}{kind}" for name in ("weight", "bias") for kind in ("", "_orig", "_mask")} | {"parametrizations"}
    added = [name for name in (*module._parameters, *module._buffers, *module._modules) if name not in known]
    return f"it holds {', '.join(added)} besides its weight and bias, which a new layer would lose" if added else None


def _check_device(weight: Tensor, name: str) -> None:
    if weight.device.type != "cpu":
        step = "load its weights first" if weight.is_meta else "move the model with model.cpu()"
        raise ValueError(f"expected a model on the CPU, got layer {name!r} on {weight.device}; {step}")


def _check_finite(tensor: Tensor | None, layer: str, what: str = "weights") -> None:
    if tensor is not None and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"expected finite {what}, got NaN or infinity in layer {layer!r}; mend the layer, or leave it out with "
            "filter_fn"
        )
