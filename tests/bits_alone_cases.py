"""A layer whose inference goes over bits, and whether it has let go of its columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offpath import SparseLinear
from offpath.ops import forced_methods


def half_sparse(dtype: torch.dtype = torch.float32) -> SparseLinear:
    return SparseLinear(130, 70, sparsity=0.5, dtype=dtype, generator=torch.Generator().manual_seed(3))


def some_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 130, generator=torch.Generator().manual_seed(4)).to(dtype)


@torch.no_grad()
def let_go(layer: nn.Module, x: Tensor | None = None, method: str = "bitmap") -> Tensor:
    """What the layer answers, which leaves it without indices."""
    with forced_methods(forward=method):
        y = layer(some_input() if x is None else x)
    assert is_without_columns(layer), "it has kept its indices"
    return y


def is_without_columns(layer: nn.Module) -> bool:
    connections = layer._connections
    return connections._are_gone and connections._prepared.matrix.kept_columns is None


def gradients_of(layer: SparseLinear) -> list[Tensor]:
    x = some_input(layer.values.dtype).requires_grad_()
    layer(x).square().sum().backward()
    gradients = [x.grad, layer.values.grad, layer.bias.grad]
    layer.zero_grad()
    return gradients
