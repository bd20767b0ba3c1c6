"""What a backend computes of a convolution with a sparse weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """All sizes of a convolution but the number of images; pairs are (height, width).

    The weight is a matrix [out_channels, in_channels / groups x kernel height x kernel width]. Around an image of
    `size` pixels stand `padding` zeros before its first pixel and `padding_after` behind its last.
    Raises `KernelError` for sizes without an output.

    >>> Convolution(3, 8, 1, (32, 32), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)).outputs
    (16, 16)
    """

    in_channels: int
    out_channels: int
    groups: int
    size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    padding_after: Pair
    dilation: Pair

    def __post_init__(self) -> None:
        if min(self.groups, self.in_channels, self.out_channels) < 1 or any(
            channels % self.groups for channels in (self.in_channels, self.out_channels)
        ):
            raise KernelError(
                f"expected channels, in whole groups, got {self.in_channels} in and {self.out_channels} out in "
                f"{self.groups} groups"
            )
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(*self.padding, *self.padding_after) < 0:
            raise KernelError(
                "expected kernel, stride and dilation of at least 1 and padding of at least 0, got "
                f"kernel={self.kernel}, stride={self.stride}, dilation={self.dilation}, padding={self.padding} and "
                f"{self.padding_after}"
            )
        if min(self.outputs) < 1:
            raise KernelError(
                f"expected images that the kernel fits into, got {self.size} pixels with padding {self.padding} and "
                f"{self.padding_after} for a kernel of {self.kernel} with dilation {self.dilation}"
            )

    @property
    def outputs(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, before, after, d, k, s in zip(
                self.size, self.padding, self.padding_after, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix."""
        return self.out_channels, self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def dense_shape(self) -> tuple[int, int, int, int]:
        """The weight as `nn.Conv2d` has it."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel


class Prepare(Protocol):
    """What a backend wants to know of a canonical pattern and a convolution; has an attribute `bytes`."""

    def __call__(
        self, crow_indices: Tensor, col_indices: Tensor, convolution: Convolution, dtype: torch.dtype
    ) -> Any: ...


@dataclass(frozen=True)
class ConvolutionProducts:
    """One implementation of a convolution and its gradients.

    Images are [images, channels, height, width] with any strides; results are contiguous, or `channels_last`.
    `forward(prepared, values, x, bias, channels_last)`; `dx(prepared, values, dy, channels_last)`;
    `dvalues(prepared, dy, x)`. An infinite x may make gradients of values NaN that a pixel beside it has, and an
    infinite value those of pixels beside its own.
    """

    prepare: Prepare
    forward: Callable[[Any, Tensor, Tensor, Tensor | None, bool], Tensor]
    dx: Callable[[Any, Tensor, Tensor, bool], Tensor]
    dvalues: Callable[[Any, Tensor, Tensor], Tensor]
