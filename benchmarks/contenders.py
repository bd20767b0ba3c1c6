"""The layers that are compared: one weight matrix, in every form that computes with it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn

from offpath import SparseLinear, pattern as patterns

# inputs, outputs, batch: the layers that the bars are set for.
SHAPES = ((1024, 1024, 256), (768, 3072, 512), (2048, 2048, 1024))
Connections = tuple[Tensor, Tensor, Tensor]


class Refused(Exception):
    """A contender cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A layer with a bias, and how to look into it.

    `weight()` is what it multiplies with, dense [out, in]; `weight_gradient()` gives rows, columns and gradient of
    every connection after a backward pass.
    """

    name: str
    layer: nn.Module
    weight: Callable[[], Tensor]
    weight_gradient: Callable[[], Connections]


def dense(inputs: int, outputs: int, sparsity: float, dtype: torch.dtype) -> Contender:
    """`nn.Linear`: it computes with every weight, so `sparsity` is not used."""
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    rows, columns = torch.ones(outputs, inputs, dtype=torch.bool).nonzero(as_tuple=True)
    return Contender("dense", layer, lambda: layer.weight, lambda: (rows, columns, layer.weight.grad[rows, columns]))


def offpath(inputs: int, outputs: int, sparsity: float, dtype: torch.dtype) -> Contender:
    """`offpath.SparseLinear`, as its users make it."""
    return of_sparse_linear(SparseLinear(inputs, outputs, dtype=dtype, sparsity=sparsity))


def of_sparse_linear(layer: SparseLinear) -> Contender:
    """The contender around a layer that exists already."""
    pattern = layer.pattern
    rows, columns = pattern.row_indices().long(), pattern.col_indices.long()
    return Contender(
        "offpath", layer, lambda: layer.to_dense().weight, lambda: (rows, columns, layer.values.grad.detach())
    )


class _TorchSparseLinear(nn.Module):
    """`torch.sparse.mm` with a CSR weight: the faster of the two products that torch has for one."""

    def __init__(self, inputs: int, outputs: int, sparsity: float, dtype: torch.dtype) -> None:
        super().__init__()
        pattern = patterns.random((outputs, inputs), round((1 - sparsity) * inputs * outputs))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            weight = pattern.to_dense(torch.randn(pattern.nnz) * inputs**-0.5).to(dtype).to_sparse_csr()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.randn(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, x.t()).t() + self.bias


def torch_sparse(inputs: int, outputs: int, sparsity: float, dtype: torch.dtype) -> Contender:
    """`torch.sparse` with a CSR weight. Raises `Refused` for a dtype that it has no products for."""
    if dtype is not torch.float32:
        raise Refused(f"torch.sparse.mm has no CSR kernel for {dtype} on the CPU")
    layer = _TorchSparseLinear(inputs, outputs, sparsity, dtype)

    def weight_gradient() -> Connections:
        rows, columns = layer.weight.detach().to_sparse_coo().coalesce().indices()
        return rows, columns, layer.weight.grad.to_dense()[rows, columns]

    return Contender("torch.sparse", layer, layer.weight.to_dense, weight_gradient)


def sparselab(inputs: int, outputs: int, sparsity: float, dtype: torch.dtype) -> Contender:
    """SparseLab's layer, which computes in float32. Raises `Refused` where it is not installed.

    It brings an OpenMP runtime of its own: measure it in a process of its own, or its idle threads slow the others.
    """
    if importlib.util.find_spec("sparselab") is None:
        raise Refused("SparseLab is not installed; to compare with it: pip install sparselab==0.2.2")
    if dtype is not torch.float32:
        raise Refused(f"SparseLab computes in float32, not in {dtype}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        import sparselab as library

        layer = library.SparseLinear(inputs, outputs, sparsity=sparsity)
    csr = layer._csr
    counts = torch.tensor(csr.row_nnz).long()
    rows = torch.arange(outputs).repeat_interleave(counts)
    # Each row has spare slots behind its connections; they are no part of the matrix.
    place = torch.arange(rows.numel()) - (counts.cumsum(0) - counts)[rows]
    slots = torch.tensor(csr.row_start).long()[rows] + place
    columns = torch.tensor(csr.col_indices).long()[slots]

    def weight() -> Tensor:
        return torch.zeros(outputs, inputs).index_put((rows, columns), layer._values.detach()[slots])

    name = f"SparseLab {version('sparselab')}"
    return Contender(name, layer, weight, lambda: (rows, columns, layer._values.grad[slots]))


CONTENDERS = {"offpath": offpath, "dense": dense, "torch.sparse": torch_sparse, "sparselab": sparselab}
