"""`offpath::sparse_conv2d` and its gradients, as ops that autograd, `torch.compile` and `opcheck` know.

Each gradient is one of the three ops again, so they can be differentiated as often as one likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import KernelError
from offpath.kernels.convolution import Convolution
from offpath.ops.choice import Explanation
from offpath.ops.convolution_choice import explain_convolution
from offpath.ops.library import define, direct
from offpath.ops.prepared import prepare
from offpath.ops.prepared_convolutions import PreparedConvolutions, is_channels_last
from offpath.ops.tangents import of_op, with_bias

# Pairs are (height, width); `padding` is top, left, bottom, right.
_SIZES = "SymInt[2] kernel, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str prefer='speed'"
_TOPOLOGY = "Tensor crow_indices, Tensor col_indices"


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    prefer: str = "speed",
) -> Tensor:
    """`conv2d` with a sparse weight, as a matrix [out_channels, in_channels / groups x kernel] in canonical CSR.

    `x` [images, in_channels, height, width], `values` [nnz], `bias` [out_channels] or None, of one floating dtype;
    `crow_indices` int32 [out_channels + 1], `col_indices` int32 [nnz]. `padding` zeros stand at the top, left, bottom
    and right. The result is channels-last where `x` is. Differentiable in `x`, `values` and `bias`.
    With `prefer="memory"`, the weight is never written out dense, not even where that is faster.
    Raises `PatternError` for index tensors that are not canonical and `KernelError` for operands without a kernel.

    >>> import torch
    >>> crow_indices, col_indices = torch.tensor([0, 2]).int(), torch.tensor([0, 3]).int()
    >>> x, values = torch.arange(9.0).view(1, 1, 3, 3), torch.tensor([1.0, 2.0])
    >>> sparse_conv2d(x, values, None, crow_indices, col_indices, (2, 2))
    tensor([[[[ 8., 11.],
              [17., 20.]]]])
    """
    if not (len(kernel) == len(stride) == len(dilation) == 2 and len(padding) == 4):
        raise KernelError(
            "expected two sizes in kernel, stride and dilation and four in padding, got "
            f"{kernel}, {stride}, {dilation} and {padding}"
        )
    operands = x, values, bias, crow_indices, col_indices, kernel, stride, padding, dilation, groups, prefer
    return direct.sparse_conv2d(*operands)


def explain_conv2d(
    shape: Sequence[int],
    values: Tensor,
    crow_indices: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    prefer: str,
) -> Explanation:
    """How `sparse_conv2d` and its gradients are computed for images of `shape`, and what they would cost."""
    convolution = _convolution(shape[2:], shape[1], crow_indices, kernel, stride, padding, dilation, groups)
    return explain_convolution(convolution, values, shape[0], channels_last, prefer)


# Making one takes as long as the call of a small layer.
_kept = lru_cache(maxsize=256)(Convolution)


def _convolution(
    size, in_channels, crow_indices, kernel, stride, padding, dilation, groups, make: Callable[..., Convolution] = _kept
) -> Convolution:
    return make(
        in_channels,
        crow_indices.shape[0] - 1,
        groups,
        (size[0], size[1]),
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
        (padding[2], padding[3]),
        (dilation[0], dilation[1]),
    )


def _prepared(
    operand: Tensor, crow_indices: Tensor, col_indices: Tensor, convolution: Convolution
) -> tuple[kernels.Backend, PreparedConvolutions]:
    backend = kernels.select(operand.device.type, operand.dtype)
    return backend, prepare(backend, crow_indices, col_indices, convolution.weight_shape).convolutions


def _check(name: str, images: Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> None:
    fits = images.dim() == 4 and all(n is None or n == m for n, m in zip(shape, images.shape, strict=True))
    if not fits or images.dtype is not dtype:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise KernelError(
            f"expected {name} of shape [{expected}] and {dtype}, got {tuple(images.shape)} {images.dtype}; cast the "
            "module or its input"
        )


def _check_values(values: Tensor, col_indices: Tensor) -> None:
    if values.shape != col_indices.shape or values.dim() != 1:
        raise KernelError(
            f"expected one value for each of {col_indices.numel()} connections, got {tuple(values.shape)}"
        )


def _forward(
    x, values, bias, crow_indices, col_indices, kernel, stride, padding, dilation, groups, prefer="speed"
) -> Tensor:
    _check("x", x, values.dtype, (None, None, None, None))
    _check_values(values, col_indices)
    if bias is not None and (bias.shape != (crow_indices.shape[0] - 1,) or bias.dtype is not x.dtype):
        raise KernelError(
            f"expected bias of shape ({crow_indices.shape[0] - 1},) and {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    sizes = kernel, stride, padding, dilation, groups
    convolution = _convolution(x.shape[2:], x.shape[1], crow_indices, *sizes)
    backend, prepared = _prepared(x, crow_indices, col_indices, convolution)
    bias = None if bias is None else bias.contiguous()
    return prepared.forward(backend, convolution, values.contiguous(), x, bias, is_channels_last(x), prefer)


def _dx(
    dy,
    values,
    crow_indices,
    col_indices,
    shape,
    channels_last,
    kernel,
    stride,
    padding,
    dilation,
    groups,
    prefer="speed",
) -> Tensor:
    convolution = _convolution(shape[2:], shape[1], crow_indices, kernel, stride, padding, dilation, groups)
    _check("dy", dy, values.dtype, (shape[0], convolution.out_channels, *convolution.outputs))
    _check_values(values, col_indices)
    backend, prepared = _prepared(dy, crow_indices, col_indices, convolution)
    return prepared.dx(backend, convolution, values.contiguous(), dy, channels_last, prefer)


def _dvalues(dy, x, crow_indices, col_indices, kernel, stride, padding, dilation, groups, prefer="speed") -> Tensor:
    _check("x", x, x.dtype, (None, None, None, None))
    convolution = _convolution(x.shape[2:], x.shape[1], crow_indices, kernel, stride, padding, dilation, groups)
    _check("dy", dy, x.dtype, (x.shape[0], convolution.out_channels, *convolution.outputs))
    backend, prepared = _prepared(x, crow_indices, col_indices, convolution)
    return prepared.dvalues(backend, convolution, dy, x, prefer)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return like.new_empty(tuple(shape)).contiguous(memory_format=memory_format)


def _fake_forward(
    x, values, bias, crow_indices, col_indices, kernel, stride, padding, dilation, groups, prefer="speed"
):
    sizes = kernel, stride, padding, dilation, groups
    convolution = _convolution(x.shape[2:], x.shape[1], crow_indices, *sizes, make=Convolution)  # of symbols, maybe
    return _empty(x, (x.shape[0], convolution.out_channels, *convolution.outputs), is_channels_last(x))


def _fake_dx(dy, values, crow_indices, col_indices, shape, channels_last, *sizes):
    return _empty(dy, shape, channels_last)


def _fake_dvalues(dy, x, crow_indices, col_indices, *sizes):
    return x.new_empty(col_indices.shape[0])


def _save(ctx, inputs, output) -> None:
    x, values, _, crow_indices, col_indices, *ctx.sizes = inputs
    ctx.save_for_backward(x, values, crow_indices, col_indices)


def _gradients(ctx, dy):
    x, values, crow_indices, col_indices = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        topology = crow_indices, col_indices
        dx = direct.sparse_conv2d_dx(dy, values, *topology, x.shape, is_channels_last(x), *ctx.sizes)
    if ctx.needs_input_grad[1]:
        dvalues = direct.sparse_conv2d_dvalues(dy, x, crow_indices, col_indices, *ctx.sizes)
    if ctx.needs_input_grad[2]:
        dbias = dy.sum((0, 2, 3))
    return dx, dvalues, dbias, *(None,) * (2 + len(ctx.sizes))


def _save_dx(ctx, inputs, output) -> None:
    dy, values, crow_indices, col_indices, _, _, *ctx.sizes = inputs
    ctx.save_for_backward(dy, values, crow_indices, col_indices)


def _gradients_of_dx(ctx, g):
    dy, values, crow_indices, col_indices = ctx.saved_tensors
    of_dy = of_values = None
    if ctx.needs_input_grad[0]:
        of_dy = direct.sparse_conv2d(g, values, None, crow_indices, col_indices, *ctx.sizes)
    if ctx.needs_input_grad[1]:
        of_values = direct.sparse_conv2d_dvalues(dy, g, crow_indices, col_indices, *ctx.sizes)
    return of_dy, of_values, *(None,) * (4 + len(ctx.sizes))


def _save_dvalues(ctx, inputs, output) -> None:
    dy, x, crow_indices, col_indices, *ctx.sizes = inputs
    ctx.save_for_backward(dy, x, crow_indices, col_indices)


def _gradients_of_dvalues(ctx, g):
    dy, x, crow_indices, col_indices = ctx.saved_tensors
    of_dy = of_x = None
    if ctx.needs_input_grad[0]:
        of_dy = direct.sparse_conv2d(x, g, None, crow_indices, col_indices, *ctx.sizes)
    if ctx.needs_input_grad[1]:
        topology = crow_indices, col_indices
        of_x = direct.sparse_conv2d_dx(dy, g, *topology, x.shape, is_channels_last(x), *ctx.sizes)
    return of_dy, of_x, *(None,) * (2 + len(ctx.sizes))


define(
    f"sparse_conv2d(Tensor x, Tensor values, Tensor? bias, {_TOPOLOGY}, {_SIZES}) -> Tensor",
    _forward,
    _fake_forward,
    (_save, _gradients),
    with_bias(of_op("sparse_conv2d", 0, 1), 2, behind=2),
)
define(
    f"sparse_conv2d_dx(Tensor dy, Tensor values, {_TOPOLOGY}, SymInt[] shape, bool channels_last, {_SIZES}) -> Tensor",
    _dx,
    _fake_dx,
    (_save_dx, _gradients_of_dx),
    of_op("sparse_conv2d_dx", 0, 1),
)
define(
    f"sparse_conv2d_dvalues(Tensor dy, Tensor x, {_TOPOLOGY}, {_SIZES}) -> Tensor",
    _dvalues,
    _fake_dvalues,
    (_save_dvalues, _gradients_of_dvalues),
    of_op("sparse_conv2d_dvalues", 0, 1),
)
