"""A sparse weight and activations that come dense: their nonzeros are looked for where that pays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from offpath.ops import sparse_linear_gradients as gradient_ops
from offpath.ops.library import direct, is_faking, is_in_a_mode, is_transforming, no_views, nobody_listens
from offpath.ops.row_choice import finding_pays
from offpath.ops.sparse_row_products import prepared_weight, sparse_matmul
from offpath.ops.sparse_rows import SparseRows
from offpath.ops.transformable import is_in_forward_mode


def sparse_matmul_of_nonzeros(
    x: Tensor, w_values: Tensor, w_crow_indices: Tensor, w_indices: Tensor, out_features: int
) -> Tensor:
    """`sparse_matmul` of the nonzeros of a dense `x` [rows, in]: looked for where that pays.

    A zero of `x` gets a gradient of zero, however the product is computed.

    >>> x = torch.tensor([[0.0, 2.0]], requires_grad=True)
    >>> y = sparse_matmul_of_nonzeros(x, torch.tensor([5.0, 7.0]), torch.tensor([0, 1, 2]).int(),
    ...                               torch.tensor([0, 0]).int(), 1)
    >>> y.sum().backward()
    >>> x.grad
    tensor([[0., 7.]])
    """
    x, weight = x.resolve_neg(), (w_values, w_crow_indices, w_indices, out_features)
    compiling = torch.compiler.is_compiling()
    in_a_mode = not compiling and is_in_a_mode()
    if not compiling and (is_transforming() or is_in_forward_mode() or x.is_meta or (in_a_mode and is_faking())):
        # How many nonzeros there are is no size that these can follow. A zero passes no gradient here either.
        return gradient_ops.dx(torch.where(x != 0, x, 0), *weight)
    # Fake ones have no zeros to look at, and who counts operations hears only of ops.
    plain = type(x) in (Tensor, Parameter) and not compiling and not in_a_mode
    if plain and w_values.dtype is x.dtype and w_values.shape == w_indices.shape:
        backend, prepared = prepared_weight(x, w_crow_indices, w_indices, out_features)
        if x.shape[1] == prepared.shape[0] and not finding_pays(x, backend, w_indices.shape[0], prepared.shape):
            return _OfNonzeros.apply(x, *weight)
    return sparse_matmul(SparseRows.from_dense(x), *weight)


class _OfNonzeros(torch.autograd.Function):
    """The product with all of x, and the gradients of one with its nonzeros."""

    @staticmethod
    def forward(ctx, x, w_values, w_crow_indices, w_indices, out_features):
        ctx.save_for_backward(x, w_values, w_crow_indices, w_indices)
        backend, prepared = prepared_weight(x, w_crow_indices, w_indices, out_features)
        return no_views(prepared.dx(backend, w_values, x, "speed"))

    @staticmethod
    def backward(ctx, dy):
        x, w_values, w_crow_indices, w_indices = ctx.saved_tensors
        weight = w_crow_indices, w_indices
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        dx = dweight = None
        if torch.is_grad_enabled() or not nobody_listens(dy):  # for second derivatives, batches of gradients
            rows = SparseRows.from_dense(x)
            parts = rows.crow_indices, rows.indices
            if wants_x:
                dx = rows.with_values(direct.rows_sparse_dots(dy, *parts, w_values, *weight)).to_dense()
            if wants_weight:
                dweight = direct.rows_sparse_weight_gradient(rows.values, *parts, dy, *weight)
            return dx, dweight, None, None, None
        backend, prepared = prepared_weight(dy, w_crow_indices, w_indices, dy.shape[1])
        if wants_x:
            products, _ = prepared.forward(backend, w_values, dy, None, "speed", feature_major=False, keep_dense=False)
            dx = torch.where(x != 0, products, 0)
        if wants_weight:
            dweight = prepared.dvalues(backend, x, dy, "speed")
        return dx, dweight, None, None, None
