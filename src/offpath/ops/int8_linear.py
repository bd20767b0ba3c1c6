"""`offpath::int8_linear`: a sparse weight of int8 values with one scale a row. For inference: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.ops.library import as_rows, define, direct, library
from offpath.ops.prepared import prepare
from offpath.ops.prepared_products import Prepared

ACTIVATIONS = ("float", "int8")


def int8_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str = "speed",
    activations: str = "float",
) -> Tensor:
    """y = x @ W.T + bias for W = diag(scales) Q, where Q (out, in) holds int8 values over canonical CSR.

    `x` [..., in] and `bias` [out] (or None) in one floating dtype, `values` int8 [nnz], `scales` float32 [out];
    `crow_indices` int32 [out + 1], `col_indices` int32 [nnz]. Returns a contiguous [..., out] in the dtype of x. Sums
    are taken of values * x as they are, in float32 at least, and then multiplied by the row's scale; in bfloat16, the
    sum and its product with the scale may each be rounded before the bias is added. With `activations="int8"`, each
    token of x is rounded to whole numbers of a 127th of its largest magnitude first, and sums are exact; which inputs a
    token shares a scale with changes its numbers, as in torch.ao's dynamic quantisation. That is done in float32: a
    token whose largest magnitude is below 2^-119 counts as zero, and one beyond float32 becomes NaN.
    Raises `RuntimeError` where a gradient is asked for, `KernelError` and `PatternError` for operands that do not fit.

    >>> crow_indices, col_indices = torch.tensor([0, 2, 3]).int(), torch.tensor([0, 2, 1]).int()
    >>> x, values = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([1, 2, 3], dtype=torch.int8)
    >>> int8_linear(x, values, torch.tensor([1.0, 0.5]), None, crow_indices, col_indices)
    tensor([[201.,  15.]])
    """
    return direct.int8_linear(x, values, scales, bias, crow_indices, col_indices, prefer, activations)


def _forward(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    prefer: str = "speed",
    activations: str = "float",
) -> Tensor:
    shape = crow_indices.shape[0] - 1, x.shape[-1]
    backend = checked_backend(x, values, scales, bias, shape[0], col_indices.numel(), activations)
    prepared = prepare(backend, crow_indices, col_indices, shape)
    return int8_product(prepared, backend, x, values, scales, bias, prefer, activations)


def checked_backend(
    x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, nnz: int, activations: str
) -> Backend:
    """What computes the product; raises `KernelError` for operands that do not fit one another."""
    if activations not in ACTIVATIONS:
        raise KernelError(f"expected activations to be 'float' or 'int8', got {activations!r}")
    if values.dtype is not torch.int8 or values.shape != (nnz,):
        raise KernelError(
            f"expected one int8 value for each of the {nnz} connections, got {values.dtype} {tuple(values.shape)}"
        )
    if scales.dtype is not torch.float32 or scales.shape != (out_features,):
        raise KernelError(
            f"expected float32 scales of shape ({out_features},), got {scales.dtype} {tuple(scales.shape)}"
        )
    if bias is not None and (bias.shape != (out_features,) or bias.dtype is not x.dtype):
        raise KernelError(
            f"expected bias of shape ({out_features},) and {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    return kernels.select(x.device.type, x.dtype)


def int8_product(
    prepared: Prepared,
    backend: Backend,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    prefer: str,
    activations: str,
) -> Tensor:
    operands = values.contiguous(), scales.contiguous(), as_rows(x), bias
    y = prepared.int8_forward(backend, *operands, prefer, activations)
    return y.view(*x.shape[:-1], y.shape[-1])


def _fake(x, values, scales, bias, crow_indices, col_indices, prefer="speed", activations="float"):
    return x.new_empty(*x.shape[:-1], crow_indices.shape[0] - 1)


def _autograd(x, values, scales, bias, crow_indices, col_indices, prefer="speed", activations="float"):
    _refuse_gradients(x, scales, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.offpath.int8_linear.default(
            x, values, scales, bias, crow_indices, col_indices, prefer, activations
        )


def _refuse_gradients(*operands: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        raise RuntimeError(
            "offpath::int8_linear is for inference only, got an operand that requires a gradient: train the "
            "SparseLinear and quantise it afterwards, and run the quantised model under torch.inference_mode()"
        )


define(
    "int8_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias, Tensor crow_indices, Tensor col_indices, "
    "str prefer='speed', str activations='float') -> Tensor",
    _forward,
    _fake,
)
library.impl("int8_linear", _autograd, "Autograd")
