"""`offpath::sparse_linear` and its gradients, as ops that autograd, `torch.compile` and `opcheck` know.

The ops are pure functions of plain tensors (the canonical CSR arrays among them), so a compiled graph needs to know
nothing of `Pattern`.

Autograd is an `autograd.Function` below the dispatcher's Autograd key instead of `torch.library.register_autograd`,
which costs about 15 us more a call: as much as a small layer itself.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.ops import sparse_linear_gradients as gradient_ops
from offpath.ops.library import (
    as_rows,
    batch,
    is_tracing,
    is_transforming,
    library,
    no_views,
    nobody_listens,
    of_one_device,
    saved_tensor_hooks,
)
from offpath.ops.prepared import prepare
from offpath.ops.transformable import is_in_forward_mode, untransformed

library.define(
    "sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor crow_indices, Tensor col_indices, "
    "str prefer='speed', bool feature_major=False) -> Tensor"
)
library.define(
    "sparse_linear_dx(Tensor dy, Tensor values, Tensor crow_indices, Tensor col_indices, SymInt in_features, "
    "str prefer='speed') -> Tensor"
)
library.define(
    "sparse_linear_dvalues(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, str prefer='speed') -> Tensor"
)
library.define(
    "sparse_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, "
    "str prefer='speed', bool feature_major=False) -> (Tensor, Tensor, Tensor)"
)
_ops = torch.ops.offpath


def sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str = "speed",
    feature_major: bool = False,
) -> Tensor:
    """y = x @ W.T + bias for a sparse W of shape (out, in) in canonical CSR.

    `x` [..., in], `values` [nnz], `bias` [out] or None, all of one floating dtype; `crow_indices` int32 [out + 1],
    `col_indices` int32 [nnz]. Returns a contiguous [..., out]. Differentiable in `x`, `values` and `bias`, any number
    of times. With `prefer="memory"`, the weight is never written out dense, not even where that is faster. With
    `feature_major`, y of a two-dimensional x may be a view of [out, batch], which saves a transpose if the consumer
    minds no strides.
    Raises `PatternError` for index tensors that are not canonical and `KernelError` for operands without a kernel.

    >>> import torch
    >>> crow_indices, col_indices = torch.tensor([0, 2, 3]).int(), torch.tensor([0, 2, 1]).int()
    >>> x, values = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([1.0, 2.0, 3.0])
    >>> sparse_linear(x, values, None, crow_indices, col_indices)
    tensor([[201.,  30.]])
    """
    if torch.compiler.is_compiling() or is_tracing():
        # Token-major: which layout a method gives is known only when it runs, and a compiler counts on strides.
        return _ops.sparse_linear.default(x, values, bias, crow_indices, col_indices, prefer)
    # What the dispatcher would call first, without the trip through it: a fifth of a small layer's time.
    return _autograd_forward(x, values, bias, crow_indices, col_indices, prefer, feature_major)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str = "speed",
    feature_major: bool = False,
) -> Tensor:
    return _forward_keeping(x, values, bias, crow_indices, col_indices, prefer, feature_major, False)[0]


def _forward_keeping(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str,
    feature_major: bool,
    keep_dense: bool,
) -> tuple[Tensor, Tensor | None]:
    shape = crow_indices.shape[0] - 1, x.shape[-1]
    backend = checked_backend(x, values, bias, shape[0], col_indices.shape[0])
    prepared = prepare(backend, crow_indices, col_indices, shape)
    return prepared.forward(backend, values, x, bias, prefer, feature_major and x.dim() == 2, keep_dense)


def checked_backend(x: Tensor, values: Tensor, bias: Tensor | None, out_features: int, nnz: int) -> Backend:
    """What computes the product; raises `KernelError` for operands that do not fit one another."""
    _check("x", x, values, nnz)
    if bias is not None and (bias.dim() != 1 or bias.numel() != out_features or bias.dtype is not x.dtype):
        raise KernelError(
            f"expected bias of shape ({out_features},) and {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    return kernels.select("cpu" if x.is_cpu else x.device.type, x.dtype)


def _dx(
    dy: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int, prefer: str = "speed"
) -> Tensor:
    _check("dy", dy, values, col_indices.shape[0])
    _check_width(dy, crow_indices)
    backend = kernels.select(dy.device.type, dy.dtype)
    shape = (crow_indices.shape[0] - 1, in_features)
    dx = prepare(backend, crow_indices, col_indices, shape).dx(backend, values, as_rows(dy), prefer)
    return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], in_features)


def _dvalues(dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, prefer: str = "speed") -> Tensor:
    _check_gradient_of(x, dy, crow_indices)
    backend = kernels.select(dy.device.type, dy.dtype)
    shape = (crow_indices.shape[0] - 1, x.shape[-1])
    return prepare(backend, crow_indices, col_indices, shape).dvalues(backend, as_rows(dy), as_rows(x), prefer)


def _backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str = "speed",
    feature_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradient_of(x, dy, crow_indices)
    return _all_gradients(dy, x, values, crow_indices, col_indices, prefer, feature_major, None)


def _all_gradients(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str,
    feature_major: bool,
    dense: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check("x", x, values, col_indices.shape[0])
    backend = kernels.select("cpu" if dy.is_cpu else dy.device.type, dy.dtype)
    prepared = prepare(backend, crow_indices, col_indices, (crow_indices.shape[0] - 1, x.shape[-1]))
    dx, dvalues, dbias = prepared.backward(
        backend, values, as_rows(dy), as_rows(x), prefer, feature_major and x.dim() == 2, dense
    )
    return dx if x.dim() == 2 else dx.view(x.shape), dvalues, dbias


def _check(name: str, operand: Tensor, values: Tensor, nnz: int) -> None:
    if operand.dtype is not values.dtype or values.dim() != 1 or values.numel() != nnz:
        raise KernelError(
            f"expected {name} and values of one dtype, and one value for each of the {nnz} connections; got {name} "
            f"{operand.dtype}, values {values.dtype} {tuple(values.shape)}. Cast the module or its input"
        )


def _check_width(dy: Tensor, crow_indices: Tensor) -> None:
    if dy.shape[-1] != crow_indices.shape[0] - 1:
        raise KernelError(f"expected dy of {crow_indices.shape[0] - 1} features, got shape {tuple(dy.shape)}")


def _check_gradient_of(x: Tensor, dy: Tensor, crow_indices: Tensor) -> None:
    _check_width(dy, crow_indices)
    if dy.dtype is not x.dtype or dy.shape[:-1] != x.shape[:-1]:
        raise KernelError(
            f"expected dy and x of one dtype and the same leading dimensions, got {dy.dtype} {tuple(dy.shape)} "
            f"and {x.dtype} {tuple(x.shape)}"
        )


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, crow_indices, col_indices, prefer, feature_major):
        wants_dx, wants_dvalues, *_ = ctx.needs_input_grad
        ctx.in_features, ctx.prefer = x.shape[-1], prefer
        # The gradient of an x that a sparse layer left feature-major goes to that layer. A compiler counts on strides.
        feature_major_x = x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
        ctx.feature_major = feature_major_x and not torch.compiler.is_compiling()
        operands, dense = (x, values, bias, crow_indices, col_indices, prefer, feature_major), None
        if wants_dx and wants_dvalues and nobody_listens(x, values, bias):
            # Checkpointing counts what is saved: the same in the second pass, whether or not somebody listens then.
            y, dense = _forward_keeping(*operands, keep_dense=not saved_tensor_hooks())
        else:
            y = _below_autograd(*operands)
        ctx.save_for_backward(
            x if wants_dvalues else None, values if wants_dx else None, crow_indices, col_indices, dense
        )
        return no_views(y)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dy,) = grad_outputs
        wants_dx, wants_dvalues, wants_dbias, *_ = ctx.needs_input_grad
        x, values, crow_indices, col_indices, dense = ctx.saved_tensors
        saved = x, values, crow_indices, col_indices
        if torch.is_grad_enabled() or not nobody_listens(dy, x, values):
            return *gradient_ops.gradients(ctx, saved, dy, ctx.feature_major), None, None, None, None
        dx = dvalues = dbias = None
        if wants_dx and wants_dvalues:
            # Autograd has seen to it that dy is like y; but `.data` of what was saved may be another one since.
            dx, dvalues, dbias = _all_gradients(dy, *saved, ctx.prefer, ctx.feature_major, dense)
        elif wants_dx:
            dx = _dx(dy, values, crow_indices, col_indices, ctx.in_features, ctx.prefer)
        elif wants_dvalues:  # the first layer of a model
            dvalues = _dvalues(dy, x, crow_indices, col_indices, ctx.prefer)
        if wants_dbias and dbias is None:
            dbias = as_rows(dy).sum(0)
        return dx, dvalues, dbias if wants_dbias else None, None, None, None, None


_apply = untransformed(_SparseLinear)


def _autograd_forward(x, values, bias, crow_indices, col_indices, prefer="speed", feature_major=False):
    if is_transforming() or is_in_forward_mode():
        return gradient_ops.transformed_linear(x, values, bias, crow_indices, col_indices, prefer)
    if torch.is_grad_enabled():
        return _apply(x, values, bias, crow_indices, col_indices, prefer, feature_major)
    return _below_autograd(x, values, bias, crow_indices, col_indices, prefer, feature_major)


def _below_autograd(x, values, bias, crow_indices, col_indices, prefer, feature_major):
    if nobody_listens(x, values, bias):
        return _forward(x, values, bias, crow_indices, col_indices, prefer, feature_major)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.sparse_linear.default(x, values, bias, crow_indices, col_indices, prefer, feature_major)


def _fake_forward(x, values, bias, crow_indices, col_indices, prefer="speed", feature_major=False):
    return x.new_empty(*x.shape[:-1], crow_indices.shape[0] - 1)


def _fake_dx(dy, values, crow_indices, col_indices, in_features, prefer="speed"):
    return dy.new_empty(*dy.shape[:-1], in_features)


def _fake_dvalues(dy, x, crow_indices, col_indices, prefer="speed"):
    return dy.new_empty(col_indices.shape[0])


def _fake_backward(dy, x, values, crow_indices, col_indices, prefer="speed", feature_major=False):
    return x.new_empty(x.shape), dy.new_empty(col_indices.shape[0]), dy.new_empty(dy.shape[-1])


def _dispatched(kernel):
    """`kernel`, where the dispatcher calls it: it writes autograd's tensors of zeros out as one number, expanded."""

    @wraps(kernel)
    def run(*operands):
        return kernel(*(one.contiguous() if isinstance(one, Tensor) and one.dim() == 1 else one for one in operands))

    return run


for _name, _kernel, _autograd, _fake, _folds in (
    ("sparse_linear", _forward, _autograd_forward, _fake_forward, True),
    ("sparse_linear_dx", _dx, gradient_ops.differentiable_dx, _fake_dx, True),
    ("sparse_linear_dvalues", _dvalues, gradient_ops.differentiable_dvalues, _fake_dvalues, False),
    ("sparse_linear_backward", _backward, gradient_ops.differentiable_backward, _fake_backward, False),
):
    library.impl(_name, _dispatched(_kernel), "CompositeExplicitAutograd")
    library.impl(_name, _autograd, "Autograd")
    torch.library.register_fake(f"offpath::{_name}", of_one_device(_name, _fake), lib=library)
    batch(_name, folds=_folds)
