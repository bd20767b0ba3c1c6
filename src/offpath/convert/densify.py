"""Sparse model -> dense model."""

from __future__ import annotations

from torch import nn

from offpath.convert.report import ConversionReport, LayerReport
from offpath.convert.swap import obstacles, swap_modules
from offpath.cost import model_bytes
from offpath.nn import SparseLinear


def densify(model: nn.Module) -> ConversionReport:
    """Swap the `SparseLinear` layers of `model` for `nn.Linear` that compute the same, in place.

    The zeros are written out. Build the optimizer afterwards. Layers that cannot be swapped without changing what the
    model computes stay sparse and stand in the report. Raises `ValueError` when the model is itself a `SparseLinear`.

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
    if isinstance(model, SparseLinear):
        raise ValueError("expected a model that contains SparseLinear layers, got one; use its to_dense()")
    replacements: dict[nn.Module, nn.Module] = {}
    layers, skipped = [], []
    blocked = obstacles(model, SparseLinear, "values")
    for name, layer in model.named_modules():
        if layer in blocked:
            skipped.append((name, blocked[layer]))
        elif isinstance(layer, SparseLinear):
            linear = layer.to_dense()
            replacements[layer] = linear
            shape = (layer.out_features, layer.in_features)
            layers.append(LayerReport(name, shape, layer.nnz, model_bytes(layer), model_bytes(linear)))
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))
