"""`offpath::sparse_linear` and its gradient ops as functions that can be differentiated and transformed again.

Each gradient is a product of the same kind as the layer's own: dx = dy @ W, dvalues = (dy.T @ x) where there are
connections, dbias = the sum of dy. So are theirs, which makes derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offpath.ops.library import as_rows, is_transforming
from offpath.ops.tangents import of_product, total, with_bias
from offpath.ops.transformable import transformed

_ops = torch.ops.offpath
_Some = Tensor | None


def linear(*operands: Any) -> Tensor:
    """`offpath::sparse_linear`, also inside of a transform."""
    return transformed_linear(*operands) if is_transforming() else _ops.sparse_linear.default(*operands)


def dx(*operands: Any) -> Tensor:
    """`offpath::sparse_linear_dx`, also inside of a transform."""
    return differentiable_dx(*operands) if is_transforming() else _ops.sparse_linear_dx.default(*operands)


def dvalues(*operands: Any) -> Tensor:
    """`offpath::sparse_linear_dvalues`, also inside of a transform."""
    return differentiable_dvalues(*operands) if is_transforming() else _ops.sparse_linear_dvalues.default(*operands)


def backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`offpath::sparse_linear_backward`, also inside of a transform."""
    return differentiable_backward(*operands) if is_transforming() else _ops.sparse_linear_backward.default(*operands)


def differentiable_dx(dy, values, crow_indices, col_indices, in_features, prefer="speed"):
    """What autograd makes of the op; the dispatcher leaves out arguments that have their defaults."""
    return _dx(dy, values, crow_indices, col_indices, in_features, prefer)


def differentiable_dvalues(dy, x, crow_indices, col_indices, prefer="speed"):
    """As above."""
    return _dvalues(dy, x, crow_indices, col_indices, prefer)


def differentiable_backward(dy, x, values, crow_indices, col_indices, prefer="speed", feature_major=False):
    """As above."""
    return _backward(dy, x, values, crow_indices, col_indices, prefer, feature_major)


def gradients(ctx: Any, saved: Sequence[Tensor], dy: Tensor, feature_major: bool = False) -> tuple[_Some, ...]:
    """Of all operands of `sparse_linear`, for that of its result; `ctx` and `saved` are what its forward has left.

    Saved tensors are unpacked once: activation checkpointing frees them when they are.
    """
    x, values, *topology = saved
    wants_dx, wants_dvalues, wants_dbias, *_ = ctx.needs_input_grad
    of_x = of_values = None
    if wants_dx and wants_dvalues:
        of_x, of_values, of_bias = backward(dy, x, values, *topology, ctx.prefer, feature_major)
        return of_x, of_values, of_bias if wants_dbias else None
    if wants_dx:
        of_x = dx(dy, values, *topology, ctx.in_features, ctx.prefer)
    if wants_dvalues:
        of_values = dvalues(dy, x, *topology, ctx.prefer)
    return of_x, of_values, as_rows(dy).sum(0) if wants_dbias else None


def _save_linear(ctx, inputs, output):
    x, values, _, crow_indices, col_indices, prefer = inputs
    ctx.in_features, ctx.prefer = x.shape[-1], prefer
    ctx.save_for_backward(x, values, crow_indices, col_indices)


def _gradients_of_linear(ctx, dy):
    return *gradients(ctx, ctx.saved_tensors, dy), None, None, None


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.prefer = next(operand for operand in inputs if isinstance(operand, str))
    ctx.save_for_backward(*(operand for operand in inputs if isinstance(operand, Tensor)))


def _gradients_of_dx(ctx, of_dx):
    dy, values, *topology = ctx.saved_tensors
    wants_dy, wants_values, *_ = ctx.needs_input_grad
    wanted = wants_dy, False, wants_values
    of_dy, _, of_values = _gradients(ctx, topology, (dy, None, values), (of_dx, None, None), wanted)
    return of_dy, of_values, None, None, None, None


def _gradients_of_dvalues(ctx, of_dvalues):
    dy, x, *topology = ctx.saved_tensors
    wants_dy, wants_x, *_ = ctx.needs_input_grad
    of_dy, of_x, _ = _gradients(ctx, topology, (dy, x, None), (None, of_dvalues, None), (wants_dy, wants_x, False))
    return of_dy, of_x, None, None, None


def _gradients_of_backward(ctx, *given):
    dy, x, values, *topology = ctx.saved_tensors
    return *_gradients(ctx, topology, (dy, x, values), given, ctx.needs_input_grad[:3]), None, None, None, None


def _gradients(
    ctx: Any,
    topology: list[Tensor],
    operands: tuple[Tensor, _Some, _Some],
    given: tuple[_Some, _Some, _Some],
    wanted: tuple[bool, bool, bool],
) -> tuple[_Some, _Some, _Some]:
    """Those `wanted` of dy, x and values, for those `given` of dx, dvalues and dbias."""
    (dy, x, values), (of_dx, of_dvalues, of_dbias) = operands, given
    wants_dy, wants_x, wants_values = wanted
    of_dy, of_x, of_values = [], None, None
    if of_dx is not None:
        of_dy.append(linear(of_dx, values, None, *topology, ctx.prefer) if wants_dy else None)
        of_values = dvalues(dy, of_dx, *topology, ctx.prefer) if wants_values else None
    if of_dvalues is not None:
        assert x is not None
        of_dvalues = of_dvalues.contiguous()  # that of a sum is one number, expanded
        of_dy.append(linear(x, of_dvalues, None, *topology, ctx.prefer) if wants_dy else None)
        of_x = dx(dy, of_dvalues, *topology, x.shape[-1], ctx.prefer) if wants_x else None
    if of_dbias is not None and wants_dy:
        of_dy.append(of_dbias.expand_as(dy))
    return total(of_dy), of_x, of_values


_tangent_of_linear = with_bias(of_product(linear, 0, 1), 2, behind=0)
_tangent_of_dx, _tangent_of_dvalues = of_product(dx, 0, 1), of_product(dvalues, 0, 1)


def _tangents_of_backward(operands, outputs, tangents):
    dy, x, values, crow_indices, col_indices, prefer, *_ = operands
    of_dy, of_x, of_values, *_ = tangents
    topology = crow_indices, col_indices
    return (
        _tangent_of_dx((dy, values, *topology, x.shape[-1], prefer), (), (of_dy, of_values)),
        _tangent_of_dvalues((dy, x, *topology, prefer), (), (of_dy, of_x)),
        None if of_dy is None else as_rows(of_dy).sum(0),
    )


transformed_linear = transformed("sparse_linear", _save_linear, _gradients_of_linear, _tangent_of_linear)
_dx = transformed("sparse_linear_dx", _save, _gradients_of_dx, _tangent_of_dx)
_dvalues = transformed("sparse_linear_dvalues", _save, _gradients_of_dvalues, _tangent_of_dvalues)
_backward = transformed("sparse_linear_backward", _save, _gradients_of_backward, _tangents_of_backward)
