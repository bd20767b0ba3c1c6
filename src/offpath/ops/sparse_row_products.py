"""The products of sparse rows with a sparse weight, as ops that autograd, `torch.compile` and `opcheck` know.

The weight is seen from its inputs: canonical CSR of shape (in, out), so that the connections of a live input lie side
by side. All three are derivatives of one sum, over the pairs of an entry and a connection at its place, of value *
weight * dy: so each gradient is one of the three again, and they can be differentiated as often as one likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.kernels.operands import row_numbers
from offpath.kernels.reference_rows import check_rows
from offpath.ops.library import define, direct
from offpath.ops.prepared import prepare
from offpath.ops.prepared_products import Prepared
from offpath.ops.row_choice import pays_over_all_connections
from offpath.ops.row_products import check_matrix, check_parts
from offpath.ops.sparse_rows import SparseRows
from offpath.ops.tangents import of_op


def sparse_matmul(
    rows: SparseRows, w_values: Tensor, w_crow_indices: Tensor, w_indices: Tensor, out_features: int
) -> Tensor:
    """y = rows @ W for a sparse W of shape (in, out) in canonical CSR: [rows, out_features].

    `w_values` [nnz] of the dtype of the rows, `w_crow_indices` int32 [in + 1], `w_indices` int32 [nnz]. Only the
    connections of inputs that an entry names are read. Differentiable in the values of both, as often as one likes.
    Raises `PatternError` for index tensors that are not canonical, and `KernelError` for operands that do not fit.

    >>> rows = SparseRows.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> w_crow_indices, w_indices = torch.tensor([0, 1, 2, 2]).int(), torch.tensor([1, 0]).int()
    >>> sparse_matmul(rows, torch.tensor([10.0, 100.0]), w_crow_indices, w_indices, 2)
    tensor([[200.,   0.],
            [  0.,  10.]])
    """
    if w_crow_indices.shape != (rows.columns + 1,):
        raise KernelError(
            f"expected a weight of {rows.columns} inputs, got w_crow_indices of shape {tuple(w_crow_indices.shape)}"
        )
    parts = rows.values, rows.crow_indices, rows.indices
    return direct.rows_sparse_matmul(*parts, w_values, w_crow_indices, w_indices, out_features)


def _matmul(
    values: Tensor,
    crow_indices: Tensor,
    indices: Tensor,
    w_values: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    width: int,
) -> Tensor:
    check_parts(crow_indices, indices, values)
    _check_weight(w_indices, w_values, values.dtype)
    backend, prepared = prepared_weight(values, w_crow_indices, w_indices, width)
    weight = prepared.matrix
    if _over_all("sparse_matmul", backend, crow_indices, indices, values, prepared):
        rows = backend.rows.written_out(crow_indices, indices, values, weight.rows)
        return prepared.dx(backend, w_values, rows, "speed")
    return backend.rows.sparse_matmul(
        crow_indices, indices, values, weight.crow_indices, weight.col_indices, w_values, width
    )


def _dots(
    dy: Tensor, crow_indices: Tensor, indices: Tensor, w_values: Tensor, w_crow_indices: Tensor, w_indices: Tensor
) -> Tensor:
    check_parts(crow_indices, indices)
    check_matrix("dy", dy, dy.dtype, rows=crow_indices.shape[0] - 1)
    _check_weight(w_indices, w_values, dy.dtype)
    backend, prepared = prepared_weight(dy, w_crow_indices, w_indices, dy.shape[1])
    weight = prepared.matrix
    if _over_all("sparse_dots", backend, crow_indices, indices, dy, prepared):
        check_rows(crow_indices, indices, weight.rows)
        products, _ = prepared.forward(backend, w_values, dy, None, "speed", feature_major=False, keep_dense=False)
        return products[row_numbers(crow_indices), indices.long()]
    return backend.rows.sparse_dots(crow_indices, indices, dy, weight.crow_indices, weight.col_indices, w_values)


def _weight_gradient(
    values: Tensor, crow_indices: Tensor, indices: Tensor, dy: Tensor, w_crow_indices: Tensor, w_indices: Tensor
) -> Tensor:
    check_parts(crow_indices, indices, values)
    check_matrix("dy", dy, values.dtype, rows=crow_indices.shape[0] - 1)
    backend, prepared = prepared_weight(dy, w_crow_indices, w_indices, dy.shape[1])
    weight = prepared.matrix
    if _over_all("sparse_weight_gradient", backend, crow_indices, indices, dy, prepared):
        rows = backend.rows.written_out(crow_indices, indices, values, weight.rows)
        return prepared.dvalues(backend, rows, dy, "speed")
    return backend.rows.sparse_weight_gradient(
        crow_indices, indices, values, dy, weight.crow_indices, weight.col_indices
    )


def _over_all(
    product: str, backend: Backend, crow_indices: Tensor, indices: Tensor, operand: Tensor, weight: Prepared
) -> bool:
    size = indices.shape[0], crow_indices.shape[0] - 1, weight.nnz, weight.shape
    return pays_over_all_connections(product, backend, operand.dtype, *size)


def prepared_weight(
    operand: Tensor, w_crow_indices: Tensor, w_indices: Tensor, out_features: int
) -> tuple[Backend, Prepared]:
    backend = kernels.select(operand.device.type, operand.dtype)
    shape = (w_crow_indices.shape[0] - 1, out_features)
    return backend, prepare(backend, w_crow_indices, w_indices, shape)


def _check_weight(w_indices: Tensor, w_values: Tensor, dtype: torch.dtype) -> None:
    if w_values.dtype is not dtype or w_values.shape != w_indices.shape:
        raise KernelError(
            f"expected a weight of {dtype} with one value for each of its {w_indices.numel()} connections, got "
            f"{w_values.dtype} {tuple(w_values.shape)}; cast the module or its input"
        )


def _fake_matmul(values, crow_indices, indices, w_values, w_crow_indices, w_indices, width):
    return values.new_empty(crow_indices.shape[0] - 1, width)


def _fake_dots(dy, crow_indices, indices, w_values, w_crow_indices, w_indices):
    return dy.new_empty(indices.shape[0])


def _fake_weight_gradient(values, crow_indices, indices, dy, w_crow_indices, w_indices):
    return values.new_empty(w_indices.shape[0])


def _save(ctx, inputs, output):
    """Of two factors at the places 0 and 3, each is for the gradient of the other."""
    first, crow_indices, indices, second, w_crow_indices, w_indices, *_ = inputs
    wants_first, _, _, wants_second, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        first if wants_second else None,
        crow_indices,
        indices,
        second if wants_first else None,
        w_crow_indices,
        w_indices,
    )


def _backward_of_matmul(ctx, dy):
    values, *rows, w_values, w_crow_indices, w_indices = ctx.saved_tensors
    wants_values, _, _, wants_weight, *_ = ctx.needs_input_grad
    weight = w_crow_indices, w_indices
    dvalues = direct.rows_sparse_dots(dy, *rows, w_values, *weight) if wants_values else None
    dweight = direct.rows_sparse_weight_gradient(values, *rows, dy, *weight) if wants_weight else None
    return dvalues, None, None, dweight, None, None, None


def _backward_of_dots(ctx, gradient):
    dy, *rows, w_values, w_crow_indices, w_indices = ctx.saved_tensors
    wants_dy, _, _, wants_weight, *_ = ctx.needs_input_grad
    weight = w_crow_indices, w_indices
    ddy = direct.rows_sparse_matmul(gradient, *rows, w_values, *weight, ctx.width) if wants_dy else None
    dweight = direct.rows_sparse_weight_gradient(gradient, *rows, dy, *weight) if wants_weight else None
    return ddy, None, None, dweight, None, None


def _backward_of_weight_gradient(ctx, gradient):
    values, *rows, dy, w_crow_indices, w_indices = ctx.saved_tensors
    wants_values, _, _, wants_dy, *_ = ctx.needs_input_grad
    weight = gradient, w_crow_indices, w_indices
    dvalues = direct.rows_sparse_dots(dy, *rows, *weight) if wants_values else None
    ddy = direct.rows_sparse_matmul(values, *rows, *weight, ctx.width) if wants_dy else None
    return dvalues, None, None, ddy, None, None


def _save_with_width(dy_at: int):
    def save(ctx, inputs, output):
        ctx.width = inputs[dy_at].shape[1]
        _save(ctx, inputs, output)

    return save


define(
    "rows_sparse_matmul(Tensor values, Tensor crow_indices, Tensor indices, Tensor w_values, Tensor w_crow_indices, "
    "Tensor w_indices, SymInt width) -> Tensor",
    _matmul,
    _fake_matmul,
    (_save, _backward_of_matmul),
    of_op("rows_sparse_matmul", 0, 3),
)
define(
    "rows_sparse_dots(Tensor dy, Tensor crow_indices, Tensor indices, Tensor w_values, Tensor w_crow_indices, "
    "Tensor w_indices) -> Tensor",
    _dots,
    _fake_dots,
    (_save_with_width(0), _backward_of_dots),
    of_op("rows_sparse_dots", 0, 3),
)
define(
    "rows_sparse_weight_gradient(Tensor values, Tensor crow_indices, Tensor indices, Tensor dy, "
    "Tensor w_crow_indices, Tensor w_indices) -> Tensor",
    _weight_gradient,
    _fake_weight_gradient,
    (_save_with_width(3), _backward_of_weight_gradient),
    of_op("rows_sparse_weight_gradient", 0, 3),
)
