"""The products of sparse rows with a sparse weight, of one instruction set."""

from __future__ import annotations

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.operands import address, are_indices, is_matrix, is_vector, refuse
from offpath.kernels.outputs import output
from offpath.kernels.plans import native_of_each_dtype
from offpath.kernels.row_operands import check_rows_fit, contiguous_rows

_MATMUL, _DOTS = native_of_each_dtype("sparse_matmul"), native_of_each_dtype("sparse_dots")
_WEIGHT_GRADIENT = native_of_each_dtype("sparse_weight_gradient")


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
    crow_indices, indices, values = crow_indices.contiguous(), indices.contiguous(), values.contiguous()
    w_values = w_values.contiguous()
    _check_weight(w_crow_indices, w_indices, w_values, values.dtype)
    if not (is_vector(values, values.dtype, indices.shape[0])):
        refuse(values=values, indices=indices)
    rows, columns = crow_indices.shape[0] - 1, w_crow_indices.shape[0] - 1
    check_rows_fit(crow_indices, indices, columns)
    y = output(values, rows, width)
    _MATMUL[values.dtype](
        isa,
        rows,
        columns,
        width,
        address(crow_indices),
        address(indices),
        address(values),
        address(w_crow_indices),
        address(w_indices),
        address(w_values),
        address(y),
        torch.get_num_threads(),
    )
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
    crow_indices, indices, w_values = crow_indices.contiguous(), indices.contiguous(), w_values.contiguous()
    rows, columns = crow_indices.shape[0] - 1, w_crow_indices.shape[0] - 1
    _check_weight(w_crow_indices, w_indices, w_values, dy.dtype)
    if not (is_matrix(dy, dy.dtype) and dy.shape[0] == rows):
        refuse(dy=dy, crow_indices=crow_indices)
    check_rows_fit(crow_indices, indices, columns)
    dy, dots = contiguous_rows(dy), output(dy, indices.shape[0])
    _DOTS[dy.dtype](
        isa,
        rows,
        columns,
        dy.shape[1],
        address(crow_indices),
        address(indices),
        address(dy),
        dy.stride(0),
        address(w_crow_indices),
        address(w_indices),
        address(w_values),
        address(dots),
        torch.get_num_threads(),
    )
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
    crow_indices, indices, values = crow_indices.contiguous(), indices.contiguous(), values.contiguous()
    rows, columns = crow_indices.shape[0] - 1, w_crow_indices.shape[0] - 1
    if not (
        are_indices(w_crow_indices, w_indices)
        and is_vector(values, dy.dtype, indices.shape[0])
        and is_matrix(dy, dy.dtype)
        and dy.shape[0] == rows
    ):
        refuse(values=values, dy=dy, w_crow_indices=w_crow_indices, w_indices=w_indices)
    check_rows_fit(crow_indices, indices, columns)
    dy, gradient = contiguous_rows(dy), output(dy, w_indices.shape[0])
    _WEIGHT_GRADIENT[dy.dtype](
        isa,
        rows,
        columns,
        dy.shape[1],
        address(crow_indices),
        address(indices),
        address(values),
        address(dy),
        dy.stride(0),
        address(w_crow_indices),
        address(w_indices),
        address(gradient),
        torch.get_num_threads(),
    )
    return gradient


def _check_weight(w_crow_indices: Tensor, w_indices: Tensor, w_values: Tensor, dtype: torch.dtype) -> None:
    if dtype not in _MATMUL or not (
        are_indices(w_crow_indices, w_indices) and is_vector(w_values, dtype, w_indices.shape[0])
    ):
        refuse(w_crow_indices=w_crow_indices, w_indices=w_indices, w_values=w_values)
