"""A convolution with the sparse weight written out; the rest is torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from offpath.kernels import Backend
from offpath.kernels.convolution import Convolution
from offpath.kernels.operands import in_own_dtype


class DenseConvolution:
    """A convolution and its gradients, by torch, of the weight whose bitmap the backend has made."""

    def __init__(self, backend: Backend, bitmap: Any, convolution: Convolution) -> None:
        self._backend, self._bitmap, self._convolution = backend, bitmap, convolution

    def forward(self, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        c = self._convolution
        x, weight = self._padded(x), self._weight(values)
        with in_own_dtype(x):
            return conv2d(x, weight, bias, c.stride, self._padding, c.dilation, c.groups)

    def dx(self, values: Tensor, dy: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=memory_format)
        dx = self._gradients(dy, self._padded(x), self._weight(values), [True, False, False])[0]
        return dx[..., : shape[2], : shape[3]].contiguous(memory_format=memory_format)

    def dvalues(self, dy: Tensor, x: Tensor) -> Tensor:
        # Only its shape and strides are read.
        weight = self._convolution_weight(x.new_zeros(1).expand(self._convolution.weight_shape))
        gradient = self._gradients(dy, self._padded(x), weight.contiguous(), [False, True, False])[1]
        return self._backend.compress(self._bitmap, gradient.reshape(self._convolution.weight_shape).contiguous())

    def _gradients(self, dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        c = self._convolution
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, c.stride, self._padding, c.dilation, False, [0, 0], c.groups, wanted
        )

    def _weight(self, values: Tensor) -> Tensor:
        return self._convolution_weight(self._backend.expand(self._bitmap, values))

    def _convolution_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._convolution.dense_shape)

    @property
    def _padding(self) -> tuple[int, int]:
        """What torch pads on both sides."""
        return self._convolution.padding

    def _padded(self, x: Tensor) -> Tensor:
        """With what is missing behind the last row and column, where that is more than before the first."""
        (top, left), (bottom, right) = self._convolution.padding, self._convolution.padding_after
        return pad(x, (0, right - left, 0, bottom - top)) if (top, left) != (bottom, right) else x
