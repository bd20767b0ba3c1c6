"""Sparse model -> dense model."""

from __future__ import annotations

import torch
from torch import nn

from offpath.convert.report import ConversionReport, LayerReport
from offpath.convert.swap import is_watched, obstacles, swap_modules
from offpath.cost import model_bytes
from offpath.nn import SparseConv1d, SparseConv2d, SparseLinear
from offpath.nn.compiled import inside_compiled
from offpath.nn.sparse_weight import SparseWeightModule

SPARSE_CLASSES = (SparseLinear, SparseConv1d, SparseConv2d)


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained
def densify(model: nn.Module) -> ConversionReport:
    """Swap the `SparseLinear` layers of `model` for `nn.Linear` that compute the same, and convolutions, in place.

    The zeros are written out. Build the optimizer afterwards. Layers that cannot be swapped without changing what the
    model computes, and sparse layers of other kinds, stay as they are and stand in the report. Raises `ValueError` when
    the model is itself such a layer, and, before anything is changed, when a topology watches one for its next update.

    >>> from offpath.convert import sparsify
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(model, sparsity=0.5)
    >>> densify(model).layers[0].bytes_after
    144
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    model = inside_compiled(model)
    if isinstance(model, SparseWeightModule):
        raise ValueError(
            f"expected a model that contains sparse layers, got a {type(model).__name__} itself; use its to_dense(), "
            "or make a SparseLinear of it first"
        )
    for name, module in model.named_modules():
        if isinstance(module, SPARSE_CLASSES) and is_watched(module):
            raise ValueError(
                f"expected layers that no topology moves, but one watches {name!r} for its next update; call "
                "topology.close() first, or densify a copy.deepcopy(model)"
            )
    replacements: dict[nn.Module, nn.Module] = {}
    layers, skipped = [], []
    blocked: dict[nn.Module, str] = {}
    for kind in SPARSE_CLASSES:
        blocked |= obstacles(model, kind, "values")
    for name, layer in model.named_modules():
        if layer in blocked:
            skipped.append((name, blocked[layer]))
        elif isinstance(layer, SPARSE_CLASSES):
            dense = layer.to_dense()
            replacements[layer] = dense
            layers.append(LayerReport(name, layer.pattern_shape, layer.nnz, model_bytes(layer), model_bytes(dense)))
        elif isinstance(layer, SparseWeightModule):
            step = "its to_sparse() first" if hasattr(layer, "to_sparse") else "make a SparseLinear of it first"
            skipped.append((name, f"it is a {type(layer).__name__}; {step}"))
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))
