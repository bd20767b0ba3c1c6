"""Sparse layers that feed one another keep their activations in the layout that the kernels want."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn

from offpath.nn import SparseLinear

# Modules that work entry by entry and keep the strides of what they get.
ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Dropout,
    nn.Identity,
)


def fuse(model: nn.Module) -> list[str]:
    """Let each `SparseLinear` whose output only another one reads hand it over untransposed; returns their names.

    Looks into every `nn.Sequential` for a sparse layer followed by elementwise modules and another sparse layer. Such a
    layer returns, for a two-dimensional input, a view of [out_features, batch], and its gradient comes back the same
    way: the numbers are the same, but `.view` may not work on what a hook between the two gets to see. A layer
    that stands at several places is left alone. `layer.feature_major = False` undoes it.

    >>> import torch
    >>> model = nn.Sequential(SparseLinear(64, 64), nn.ReLU(), SparseLinear(64, 64))
    >>> fuse(model)
    ['0']
    >>> model(torch.randn(8, 64)).is_contiguous()
    True
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    fused = []
    for container in model.modules():
        if type(container) is not nn.Sequential:
            continue
        steps = [module for module in container if type(module) not in ELEMENTWISE]
        for layer, consumer in pairwise(steps):
            if type(layer) is SparseLinear and type(consumer) is SparseLinear and places[id(layer)] == 1:
                layer.feature_major = True
                fused.append(names[id(layer)])
    return fused
