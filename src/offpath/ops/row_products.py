"""The products on sparse rows as ops that autograd, `torch.compile` and `opcheck` know.

Each gradient of the three products is one of the three again, so they can be differentiated as often as one likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import KernelError
from offpath.kernels.operands import in_own_dtype
from offpath.ops.int32 import expect_columns
from offpath.ops.library import define, direct
from offpath.ops.row_choice import pays_densely
from offpath.ops.tangents import OF_DOTS, OF_WEIGHT_GRADIENT, of_op


def _matmul(values: Tensor, crow_indices: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    check_parts(crow_indices, indices, values)
    check_matrix("weight", weight, values.dtype)
    backend, rows = kernels.select(values.device.type, values.dtype), crow_indices.shape[0] - 1
    if pays_densely("matmul", backend, values, indices.shape[0], rows, *weight.shape):
        return _product(backend.rows.written_out(crow_indices, indices, values, weight.shape[0]), weight)
    return backend.rows.matmul(crow_indices, indices, values, weight)


def _dots(dy: Tensor, crow_indices: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    check_parts(crow_indices, indices)
    check_matrix("dy", dy, dy.dtype, rows=crow_indices.shape[0] - 1)
    check_matrix("weight", weight, dy.dtype, width=dy.shape[1])
    backend = kernels.select(dy.device.type, dy.dtype)
    if pays_densely("dots", backend, dy, indices.shape[0], dy.shape[0], *weight.shape):
        return backend.rows.dense_dots(crow_indices, indices, dy, weight)
    return backend.rows.dots(crow_indices, indices, dy, weight)


def _weight_gradient(values: Tensor, crow_indices: Tensor, indices: Tensor, dy: Tensor, columns: int) -> Tensor:
    check_parts(crow_indices, indices, values)
    check_matrix("dy", dy, values.dtype, rows=crow_indices.shape[0] - 1)
    expect_columns(columns)
    backend = kernels.select(dy.device.type, dy.dtype)
    if pays_densely("weight_gradient", backend, dy, indices.shape[0], dy.shape[0], columns, dy.shape[1]):
        return _product(backend.rows.written_out(crow_indices, indices, values, columns).t(), dy)
    return backend.rows.weight_gradient(crow_indices, indices, values, dy, columns)


def _product(left: Tensor, right: Tensor) -> Tensor:
    with in_own_dtype(left):
        return left @ right


def _gradients(
    dy: Tensor, values: Tensor, crow_indices: Tensor, indices: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients of a product, of the values and of the weight."""
    backend = kernels.select(dy.device.type, dy.dtype)
    sizes = backend, dy, indices.shape[0], dy.shape[0], *weight.shape
    if backend.rows.gradients is None or pays_densely("dots", *sizes) or pays_densely("weight_gradient", *sizes):
        dots = _dots(dy, crow_indices, indices, weight)
        return dots, _weight_gradient(values, crow_indices, indices, dy, weight.shape[0])
    check_parts(crow_indices, indices, values)
    check_matrix("dy", dy, values.dtype, rows=crow_indices.shape[0] - 1)
    check_matrix("weight", weight, values.dtype, width=dy.shape[1])
    return backend.rows.gradients(crow_indices, indices, values, dy, weight)


def _encoder_gradients(
    values: Tensor, crow_indices: Tensor, indices: Tensor, dy: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """The gradient of an encoder's weight, and that of its bias."""
    backend = kernels.select(dy.device.type, dy.dtype)
    sizes = backend, dy, indices.shape[0], dy.shape[0], columns, dy.shape[1]
    check_parts(crow_indices, indices, values)
    check_matrix("dy", dy, values.dtype, rows=crow_indices.shape[0] - 1)
    if pays_densely("weight_gradient", *sizes):
        rows = backend.rows.written_out(crow_indices, indices, values, columns)
        return _product(rows.t(), dy), rows.sum(0)
    return backend.rows.encoder_gradients(crow_indices, indices, values, dy, columns)


def _add_weight_gradient(buffer: Tensor, values: Tensor, crow_indices: Tensor, indices: Tensor, dy: Tensor) -> None:
    check_parts(crow_indices, indices, values)
    check_matrix("dy", dy, values.dtype, rows=crow_indices.shape[0] - 1)
    check_matrix("buffer", buffer, values.dtype, width=dy.shape[1])
    kernels.select(dy.device.type, dy.dtype).rows.add_weight_gradient(crow_indices, indices, values, dy, buffer)
    if not buffer.is_inference():
        torch.autograd.graph.increment_version(buffer)  # kernels write past autograd


def check_parts(crow_indices: Tensor, indices: Tensor, values: Tensor | None = None) -> None:
    """Raises `KernelError` unless these are parts of sparse rows; what the indices say is for the kernels to check."""
    fits = (
        crow_indices.dtype is torch.int32
        and indices.dtype is torch.int32
        and crow_indices.dim() == 1
        and crow_indices.shape[0] > 0
        and indices.dim() == 1
        and (values is None or values.shape == indices.shape)
    )
    if not fits:
        got = [crow_indices, indices] if values is None else [crow_indices, indices, values]
        raise KernelError(
            "expected crow_indices int32 [rows + 1], indices int32 [nnz] and as many values; got "
            + ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in got)
        )


def check_matrix(
    name: str, matrix: Tensor, dtype: torch.dtype, rows: int | None = None, width: int | None = None
) -> None:
    """Raises `KernelError` unless `matrix` has this dtype and shape."""
    if (
        matrix.dim() != 2
        or matrix.dtype is not dtype
        or (rows is not None and matrix.shape[0] != rows)
        or (width is not None and matrix.shape[1] != width)
    ):
        shape = f"[{'any' if rows is None else rows}, {'any' if width is None else width}]"
        raise KernelError(f"expected {name} as a matrix {shape} of {dtype}, got {list(matrix.shape)} of {matrix.dtype}")


def _fake_matmul(values, crow_indices, indices, weight):
    return values.new_empty(crow_indices.shape[0] - 1, weight.shape[1])


def _fake_dots(dy, crow_indices, indices, weight):
    return dy.new_empty(indices.shape[0])


def _fake_gradients(dy, values, crow_indices, indices, weight):
    return dy.new_empty(indices.shape[0]), weight.new_empty(weight.shape)


def _fake_weight_gradient(values, crow_indices, indices, dy, columns):
    return values.new_empty(columns, dy.shape[1])


def _fake_encoder_gradients(values, crow_indices, indices, dy, columns):
    return values.new_empty(columns, dy.shape[1]), values.new_empty(columns)


def _save_matmul(ctx, inputs, output):
    values, crow_indices, indices, weight = inputs
    wants_values, _, _, wants_weight, *_ = ctx.needs_input_grad
    ctx.columns = weight.shape[0]
    ctx.save_for_backward(values if wants_weight else None, crow_indices, indices, weight if wants_values else None)


def _backward_of_matmul(ctx, dy):
    values, crow_indices, indices, weight = ctx.saved_tensors
    wants_values, _, _, wants_weight = ctx.needs_input_grad
    dy = dy.contiguous()
    dvalues = dweight = None
    if wants_values and wants_weight:
        dvalues, dweight = direct.rows_gradients(dy, values, crow_indices, indices, weight)
    elif wants_values:
        dvalues = direct.rows_dots(dy, crow_indices, indices, weight)
    elif wants_weight:
        dweight = direct.rows_weight_gradient(values, crow_indices, indices, dy, ctx.columns)
    return dvalues, None, None, dweight


def _save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_of_gradients(ctx, ddvalues, ddweight):
    dy, values, crow_indices, indices, weight = ctx.saved_tensors
    wants_dy, wants_values, _, _, wants_weight = ctx.needs_input_grad
    rows = crow_indices, indices
    ddvalues, ddweight = ddvalues.contiguous(), ddweight.contiguous()
    ddy = dvalues = dweight = None
    if wants_dy:
        ddy = direct.rows_matmul(ddvalues, *rows, weight) + direct.rows_matmul(values, *rows, ddweight)
    if wants_values:
        dvalues = direct.rows_dots(dy, *rows, ddweight)
    if wants_weight:
        dweight = direct.rows_weight_gradient(ddvalues, *rows, dy, weight.shape[0])
    return ddy, dvalues, None, None, dweight


def _save_dots(ctx, inputs, output):
    dy, crow_indices, indices, weight = inputs
    wants_dy, _, _, wants_weight, *_ = ctx.needs_input_grad
    ctx.columns = weight.shape[0]
    ctx.save_for_backward(dy if wants_weight else None, crow_indices, indices, weight if wants_dy else None)


def _backward_of_dots(ctx, gradient):
    dy, crow_indices, indices, weight = ctx.saved_tensors
    wants_dy, _, _, wants_weight = ctx.needs_input_grad
    ddy = direct.rows_matmul(gradient, crow_indices, indices, weight) if wants_dy else None
    dweight = None
    if wants_weight:
        dweight = direct.rows_weight_gradient(gradient, crow_indices, indices, dy, ctx.columns)
    return ddy, None, None, dweight


def _save_weight_gradient(ctx, inputs, output):
    values, crow_indices, indices, dy, _ = inputs
    wants_values, _, _, wants_dy, *_ = ctx.needs_input_grad
    ctx.save_for_backward(values if wants_dy else None, crow_indices, indices, dy if wants_values else None)


def _backward_of_weight_gradient(ctx, gradient):
    values, crow_indices, indices, dy = ctx.saved_tensors
    wants_values, _, _, wants_dy, _ = ctx.needs_input_grad
    gradient = gradient.contiguous()
    dvalues = direct.rows_dots(dy, crow_indices, indices, gradient) if wants_values else None
    ddy = direct.rows_matmul(values, crow_indices, indices, gradient) if wants_dy else None
    return dvalues, None, None, ddy, None


def _save_encoder_gradients(ctx, inputs, output):
    values, crow_indices, indices, dy, _ = inputs
    ctx.save_for_backward(values, crow_indices, indices, dy)


def _backward_of_encoder_gradients(ctx, of_weight, of_bias):
    values, crow_indices, indices, dy = ctx.saved_tensors
    wants_values, _, _, wants_dy, _ = ctx.needs_input_grad
    of_weight = of_weight.contiguous()
    dvalues = ddy = None
    if wants_values:
        dvalues = direct.rows_dots(dy, crow_indices, indices, of_weight) + of_bias.index_select(0, indices)
    if wants_dy:
        ddy = direct.rows_matmul(values, crow_indices, indices, of_weight)
    return dvalues, None, None, ddy, None


def _tangents_of_gradients(operands, outputs, tangents):
    dy, values, *rows, weight = operands
    of_dy, of_values, *none, of_weight = tangents
    of_dots = OF_DOTS((dy, *rows, weight), (), (of_dy, *none, of_weight))
    return of_dots, OF_WEIGHT_GRADIENT((values, *rows, dy, weight.shape[0]), (), (of_values, *none, of_dy))


def _tangents_of_encoder_gradients(operands, outputs, tangents):
    values, *rows, _, columns = operands
    of_values, *_ = tangents
    of_weight = OF_WEIGHT_GRADIENT(operands, (), tangents)
    ones = values.new_ones(rows[0].shape[0] - 1, 1)
    return of_weight, direct.rows_weight_gradient(of_values, *rows, ones, columns)[:, 0]


define(
    "rows_matmul(Tensor values, Tensor crow_indices, Tensor indices, Tensor weight) -> Tensor",
    _matmul,
    _fake_matmul,
    (_save_matmul, _backward_of_matmul),
    of_op("rows_matmul", 0, 3),
)
define(
    "rows_dots(Tensor dy, Tensor crow_indices, Tensor indices, Tensor weight) -> Tensor",
    _dots,
    _fake_dots,
    (_save_dots, _backward_of_dots),
    OF_DOTS,
)
define(
    "rows_weight_gradient(Tensor values, Tensor crow_indices, Tensor indices, Tensor dy, SymInt columns) -> Tensor",
    _weight_gradient,
    _fake_weight_gradient,
    (_save_weight_gradient, _backward_of_weight_gradient),
    OF_WEIGHT_GRADIENT,
)
define(
    "rows_encoder_gradients(Tensor values, Tensor crow_indices, Tensor indices, Tensor dy, SymInt columns) -> "
    "(Tensor, Tensor)",
    _encoder_gradients,
    _fake_encoder_gradients,
    (_save_encoder_gradients, _backward_of_encoder_gradients),
    _tangents_of_encoder_gradients,
)
define(
    "rows_gradients(Tensor dy, Tensor values, Tensor crow_indices, Tensor indices, Tensor weight) -> (Tensor, Tensor)",
    _gradients,
    _fake_gradients,
    (_save_gradients, _backward_of_gradients),
    _tangents_of_gradients,
)
define(
    "add_rows_weight_gradient(Tensor(a!) buffer, Tensor values, Tensor crow_indices, Tensor indices, Tensor dy) -> ()",
    _add_weight_gradient,
    lambda buffer, values, crow_indices, indices, dy: None,
)
