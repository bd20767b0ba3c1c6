"""The definition of a convolution with a sparse weight: torch's own with the weight written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torch.nn.grad import conv2d_input, conv2d_weight

from offpath.kernels.convolution import Convolution, ConvolutionProducts
from offpath.kernels.operands import row_numbers, wide


@dataclass(frozen=True)
class Prepared:
    """Nothing but the arguments: the definition prepares nothing."""

    crow_indices: Tensor
    col_indices: Tensor
    convolution: Convolution
    dtype: torch.dtype
    bytes: int = 0

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each connection in the weight as a matrix."""
        return row_numbers(self.crow_indices), self.col_indices.long()

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Zeros on the left, right, top and bottom, as `pad` wants them."""
        (top, left), (bottom, right) = self.convolution.padding, self.convolution.padding_after
        return left, right, top, bottom


def forward(prepared: Prepared, values: Tensor, x: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """y = conv2d(x, the values at their places and zeros elsewhere, bias)."""
    c = prepared.convolution
    weight = _written_out(prepared, values)
    wide_bias = None if bias is None else wide(bias)
    y = conv2d(pad(wide(x), prepared.pads), weight, wide_bias, c.stride, 0, c.dilation, c.groups)
    return _in_format(y.to(values.dtype), channels_last)


def dx(prepared: Prepared, values: Tensor, dy: Tensor, channels_last: bool) -> Tensor:
    """The gradient of `forward` in x."""
    c = prepared.convolution
    padded = pad(wide(dy).new_zeros(dy.shape[0], c.in_channels, *c.size), prepared.pads).shape
    gradient = conv2d_input(padded, _written_out(prepared, values), wide(dy), c.stride, 0, c.dilation, c.groups)
    return _in_format(pad(gradient, [-n for n in prepared.pads]).to(dy.dtype), channels_last)


def dvalues(prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `forward` in the values."""
    c = prepared.convolution
    padded = pad(wide(x), prepared.pads)
    gradient = conv2d_weight(padded, c.dense_shape, wide(dy), c.stride, 0, c.dilation, c.groups)
    return gradient.reshape(c.weight_shape)[prepared.places].to(dy.dtype)


def _written_out(prepared: Prepared, values: Tensor) -> Tensor:
    c = prepared.convolution
    return wide(values).new_zeros(c.weight_shape).index_put(prepared.places, wide(values)).view(c.dense_shape)


def _in_format(images: Tensor, channels_last: bool) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _prepare(crow_indices: Tensor, col_indices: Tensor, convolution: Convolution, dtype: torch.dtype) -> Prepared:
    return Prepared(crow_indices, col_indices, convolution, dtype)


CONVOLUTIONS = ConvolutionProducts(_prepare, forward, dx, dvalues)
