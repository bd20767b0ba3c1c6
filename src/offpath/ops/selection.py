"""Which entries of a sample live: ops that turn dense scores into sparse rows.

The gradient of what was chosen goes to where it was chosen from, and nothing to the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import KernelError
from offpath.kernels.operands import row_numbers as row_numbers, wide
from offpath.ops.int32 import expect_entries
from offpath.ops.library import define, direct
from offpath.ops.tangents import OF_DOTS, total


def row_pointer(rows: int, k: int, device: torch.device) -> Tensor:
    """The `crow_indices` of `rows` rows of k entries each."""
    expect_entries(rows * k)
    if k == 0:
        return torch.zeros(rows + 1, dtype=torch.int32, device=device)
    return torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=device)


def _topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_scores(x)
    _check_k(k, x.shape[1])
    expect_entries(x.shape[0] * k)
    return kernels.select(x.device.type, x.dtype).rows.topk(x, k)


def _batch_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    check_scores(x)
    _check_k(k, x.numel())
    return kernels.select(x.device.type, x.dtype).rows.batch_topk(x, k)


def _above(x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_scores(x)
    if threshold is not None and (threshold.shape != x.shape[1:] or threshold.dtype is not x.dtype):
        raise KernelError(
            f"expected a threshold of {x.dtype} for each of the {x.shape[1]} columns, got {threshold.dtype} "
            f"{tuple(threshold.shape)}"
        )
    return kernels.select(x.device.type, x.dtype).rows.above(x, threshold)


def _encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    check_scores(x)
    _check_k(k, weight.shape[0])
    expect_entries(x.shape[0] * k)
    operands = (weight,) if bias is None else (weight, bias)
    if (
        weight.dim() != 2
        or weight.shape[1] != x.shape[1]
        or any(operand.dtype is not x.dtype for operand in operands)
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise KernelError(
            f"expected weight [latents, {x.shape[1]}] and bias [latents] of {x.dtype}, got "
            + " and ".join(f"{operand.dtype} {tuple(operand.shape)}" for operand in operands)
        )
    return kernels.select(x.device.type, x.dtype).rows.encode_topk(x, weight, bias, k)


def check_scores(x: Tensor) -> None:
    """Raises `KernelError` unless `x` is a matrix."""
    if x.dim() != 2:
        raise KernelError(
            f"expected scores [rows, columns], got shape {tuple(x.shape)}; flatten the leading dimensions"
        )


def _check_k(k: int, most: int) -> None:
    if not 0 <= k <= most:
        raise KernelError(f"expected k from 0 to the {most} entries that there are to choose from, got {k}")


def _fake_topk(x, k):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _fake_batch_topk(x, k):
    crow_indices = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    return crow_indices, x.new_empty(k, dtype=torch.int32), x.new_empty(k)


def _fake_above(x, threshold):
    nnz = torch.library.get_ctx().new_dynamic_size()
    crow_indices = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    return crow_indices, x.new_empty(nnz, dtype=torch.int32), x.new_empty(nnz)


def _fake_encode_topk(x, weight, bias, k):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _save_topk(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])


def _backward_of_topk(ctx, dvalues, _):
    (indices,) = ctx.saved_tensors
    return dvalues.new_zeros(ctx.shape).scatter(1, indices.long(), dvalues), None


def _save_sparse(ctx, inputs, output):
    crow_indices, indices, _ = output
    ctx.mark_non_differentiable(crow_indices, indices)
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(crow_indices, indices)


def _backward_of_sparse(ctx, _, __, dvalues):
    crow_indices, indices = ctx.saved_tensors
    return to_dense(crow_indices, indices, dvalues, ctx.shape[1], distinct=True), None


def to_dense(crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int, distinct: bool = False) -> Tensor:
    """Rows with their zeros written out, [rows, columns].

    Entries at one place add up; where there are none (`distinct`), writing takes a third of the time.
    """
    rows = crow_indices.shape[0] - 1
    if rows * columns == 0:  # inductor refuses to index nothing with a number of indices that it does not know
        return values.new_zeros(rows, columns) + values.sum()
    places = row_numbers(crow_indices, indices.shape[0]) * columns + indices
    added = values if distinct else wide(values)
    dense = added.new_zeros(rows * columns).index_put_((places,), added, accumulate=not distinct)
    return dense.to(values.dtype).view(rows, columns)


def _save_encode(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias = bias is not None
    wants_x, wants_weight, *_ = ctx.needs_input_grad
    ctx.columns = weight.shape[0]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, output[1])


def _backward_of_encode(ctx, dvalues, _):
    x, weight, indices = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    crow_indices = row_pointer(indices.shape[0], indices.shape[1], indices.device)
    dvalues, flat = dvalues.reshape(-1), indices.flatten()
    wanted = wants_x, wants_weight, ctx.has_bias and wants_bias
    return *gradients_of_encoder(dvalues, crow_indices, flat, x, weight, ctx.columns, wanted), None


def gradients_of_encoder(
    dvalues: Tensor,
    crow_indices: Tensor,
    indices: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    columns: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, those that are `wanted`, for entries of x @ weight.T + bias and their gradients `dvalues`.

    `x` may be None where the weight's is not wanted, `weight` [columns, width] where that of x is not.
    """
    wants_x, wants_weight, wants_bias = wanted
    rows = crow_indices, indices
    dx = direct.rows_matmul(dvalues, *rows, weight) if wants_x else None
    if wants_weight and wants_bias:
        return dx, *direct.rows_encoder_gradients(dvalues, *rows, x, columns)
    dweight = direct.rows_weight_gradient(dvalues, *rows, x, columns) if wants_weight else None
    dbias = None
    if wants_bias:
        ones = dvalues.new_ones(crow_indices.shape[0] - 1, 1)
        dbias = direct.rows_weight_gradient(dvalues, *rows, ones, columns)[:, 0]
    return dx, dweight, dbias


def _tangents_of_topk(operands, outputs, tangents):
    return tangents[0].gather(1, outputs[1].long()), None


def _tangents_of_sparse(operands, outputs, tangents):
    crow_indices, indices, _ = outputs
    return None, None, tangents[0][row_numbers(crow_indices, indices.shape[0]), indices.long()]


def _tangents_of_encode(operands, outputs, tangents):
    x, weight, *_ = operands
    values, indices = outputs
    crow_indices = row_pointer(indices.shape[0], indices.shape[1], indices.device)
    of_values = tangent_of_encoder(crow_indices, indices.flatten(), x, weight, tangents[:3])
    return None if of_values is None else of_values.view(values.shape), None


def tangent_of_encoder(
    crow_indices: Tensor, indices: Tensor, x: Tensor, weight: Tensor, tangents: Sequence[Tensor | None]
) -> Tensor | None:
    """Of entries of x @ weight.T + bias, for the `tangents` of x, weight and bias that there are."""
    of_x, of_weight, of_bias = tangents
    of_products = OF_DOTS((x, crow_indices, indices, weight), (), (of_x, None, None, of_weight))
    return total((of_products, None if of_bias is None else of_bias.index_select(0, indices)))


define(
    "topk_rows(Tensor x, int k) -> (Tensor, Tensor)",
    _topk,
    _fake_topk,
    (_save_topk, _backward_of_topk),
    _tangents_of_topk,
)
define(
    "batch_topk(Tensor x, SymInt k) -> (Tensor, Tensor, Tensor)",
    _batch_topk,
    _fake_batch_topk,
    (_save_sparse, _backward_of_sparse),
    _tangents_of_sparse,
)
define(
    "above(Tensor x, Tensor? threshold) -> (Tensor, Tensor, Tensor)",
    _above,
    _fake_above,
    (_save_sparse, _backward_of_sparse),
    _tangents_of_sparse,
)
define(
    "encode_topk(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor, Tensor)",
    _encode_topk,
    _fake_encode_topk,
    (_save_encode, _backward_of_encode),
    _tangents_of_encode,
)
