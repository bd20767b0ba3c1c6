"""The products of layers that own their `Connections`, which inference leaves with one bit per position if it can."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.ops.int8_linear import checked_backend as checked_int8_backend, int8_linear, int8_product
from offpath.ops.library import nobody_listens
from offpath.ops.prepared import Connections
from offpath.ops.sparse_linear import checked_backend, sparse_linear


def sparse_linear_of(
    connections: Connections,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    prefer: str = "speed",
    feature_major: bool = False,
) -> Tensor:
    """`sparse_linear` for the owner of `connections`, which inference leaves with the bits alone where they will do."""
    if torch.compiler.is_compiling() or not _is_plain_inference(x, values, bias):
        indices = connections.crow_indices, connections.col_indices
        return sparse_linear(x, values, bias, *indices, prefer, feature_major)
    backend = checked_backend(x, values, bias, connections.crow_indices.shape[0] - 1, connections.nnz)
    y, _ = connections.known(backend, x.shape[-1]).forward(
        backend, values, x, bias, prefer, feature_major and x.dim() == 2, False
    )
    connections.let_columns_go(backend)
    return y


def int8_linear_of(
    connections: Connections,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    prefer: str = "speed",
    activations: str = "float",
) -> Tensor:
    """`int8_linear` for the owner of `connections`, which it leaves with the bits alone where they will do."""
    if torch.compiler.is_compiling() or not _is_plain_inference(x, values, scales, bias):
        indices = connections.crow_indices, connections.col_indices
        return int8_linear(x, values, scales, bias, *indices, prefer, activations)
    out_features, nnz = connections.crow_indices.shape[0] - 1, connections.nnz
    backend = checked_int8_backend(x, values, scales, bias, out_features, nnz, activations)
    y = int8_product(connections.known(backend, x.shape[-1]), backend, x, values, scales, bias, prefer, activations)
    connections.let_columns_go(backend)
    return y


def _is_plain_inference(*operands: Tensor | None) -> bool:
    """Whether a product of these is all that anybody wants."""
    if torch.is_grad_enabled():
        for operand in operands:  # a generator expression would take as long as all the rest
            if operand is not None and operand.requires_grad:
                return False
    return nobody_listens(*operands)
