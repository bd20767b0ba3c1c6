"""The products of sparse rows with a sparse weight, of one instruction set."""

from __future__ import annotations

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.operands import not_expanded
from offpath.kernels.outputs import output
from offpath.kernels.row_operands import copied_or_refused_rows


def sparse_matmul(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    w_values: Tensor,
    width: int,
) -> Tensor:
    y = output(values, max(crow_indices.numel(), 1) - 1, width)
    rows, weight = (crow_indices, indices), (w_crow_indices, w_indices, w_values)
    operands = isa, *rows, values, *weight, y, torch.get_num_threads()
    if not _native.sparse_matmul(*operands):
        named = {"values": values, "w_crow_indices": w_crow_indices, "w_indices": w_indices, "w_values": w_values}
        copied_or_refused_rows(_native.sparse_matmul, operands, *rows, w_crow_indices.numel() - 1, named)
    return y


def sparse_dots(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    dy: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    w_values: Tensor,
) -> Tensor:
    dy, dots = not_expanded(dy), output(dy, indices.numel())
    rows, weight = (crow_indices, indices), (w_crow_indices, w_indices, w_values)
    operands = isa, *rows, dy, *weight, dots, torch.get_num_threads()
    if not _native.sparse_dots(*operands):
        named = {"dy": dy, "w_crow_indices": w_crow_indices, "w_indices": w_indices, "w_values": w_values}
        copied_or_refused_rows(_native.sparse_dots, operands, *rows, w_crow_indices.numel() - 1, named)
    return dots


def sparse_weight_gradient(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    dy: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
) -> Tensor:
    dy, gradient = not_expanded(dy), output(dy, w_indices.numel())
    rows = crow_indices, indices
    operands = isa, *rows, values, dy, w_crow_indices, w_indices, gradient, torch.get_num_threads()
    if not _native.sparse_weight_gradient(*operands):
        named = {"values": values, "dy": dy, "w_crow_indices": w_crow_indices, "w_indices": w_indices}
        copied_or_refused_rows(_native.sparse_weight_gradient, operands, *rows, w_crow_indices.numel() - 1, named)
    return gradient
