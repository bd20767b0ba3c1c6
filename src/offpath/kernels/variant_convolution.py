"""The convolutions of one instruction set: operands checked, memory for results taken, the native function called."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.convolution import Convolution, ConvolutionProducts
from offpath.kernels.operands import DTYPES, address, are_indices, is_vector, refuse
from offpath.kernels.outputs import output
from offpath.kernels.plans import native_of_each_dtype

_MAKE_PLAN, _MAKE_TILES = map(native_of_each_dtype, ("make_convolution_plan", "make_convolution_tiles"))
_FORWARD, _DX, _DVALUES = map(native_of_each_dtype, ("convolve", "convolution_dx", "convolution_dvalues"))


class Prepared:
    """The plans of one pattern for one convolution, each made when the first product needs it.

    The index tensors must not change.
    """

    def __init__(
        self, isa: int, crow_indices: Tensor, col_indices: Tensor, convolution: Convolution, dtype: torch.dtype
    ) -> None:
        self.convolution, self.dtype, self.nnz = convolution, dtype, col_indices.shape[0]
        self._isa, self._indices = isa, (crow_indices, col_indices)
        by_axis = (convolution.size, convolution.kernel, convolution.stride, convolution.padding, convolution.dilation)
        axes = zip(*by_axis, convolution.outputs, strict=True)
        rows, columns = axes
        self.sizes = (convolution.in_channels, convolution.out_channels, convolution.groups, *rows, *columns)

    @cached_property
    def forward(self) -> Any:
        return self._plan(False)

    @cached_property
    def dx(self) -> Any:
        return self._plan(True)

    @cached_property
    def dvalues(self) -> Any:
        return _MAKE_TILES[self.dtype](self._isa, self.sizes, *map(address, self._indices), torch.get_num_threads())

    @property
    def bytes(self) -> int:
        """Bytes of the plans made so far."""
        return sum(vars(self)[name].bytes for name in ("forward", "dx", "dvalues") if name in vars(self))

    def _plan(self, input_gradient: bool) -> Any:
        addresses = map(address, self._indices)
        return _MAKE_PLAN[self.dtype](self._isa, self.sizes, input_gradient, *addresses, torch.get_num_threads())


class ConvolutionVariant:
    """The convolutions of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def products(self) -> ConvolutionProducts:
        return ConvolutionProducts(self.prepare, self.forward, self.dx, self.dvalues)

    def prepare(
        self, crow_indices: Tensor, col_indices: Tensor, convolution: Convolution, dtype: torch.dtype
    ) -> Prepared:
        fits = are_indices(crow_indices, col_indices) and crow_indices.shape[0] == convolution.out_channels + 1
        if not fits or dtype not in DTYPES:
            refuse(crow_indices=crow_indices, col_indices=col_indices)
        return Prepared(self._index, crow_indices, col_indices, convolution, dtype)

    def forward(
        self, prepared: Prepared, values: Tensor, x: Tensor, bias: Tensor | None, channels_last: bool
    ) -> Tensor:
        convolution, dtype = prepared.convolution, prepared.dtype
        if not (
            is_vector(values, dtype, prepared.nnz)
            and _is_input(x, prepared)
            and (bias is None or is_vector(bias, dtype, convolution.out_channels))
        ):
            refuse(values=values, x=x, bias=bias)
        y = _images(x, convolution.out_channels, convolution.outputs, channels_last)
        _FORWARD[dtype](
            self._index,
            prepared.forward,
            prepared.sizes,
            x.shape[0],
            address(values),
            0 if bias is None else address(bias),
            address(x),
            x.stride(),
            address(y),
            y.stride(),
            torch.get_num_threads(),
        )
        return y

    def dx(self, prepared: Prepared, values: Tensor, dy: Tensor, channels_last: bool) -> Tensor:
        convolution, dtype = prepared.convolution, prepared.dtype
        if not (is_vector(values, dtype, prepared.nnz) and _is_output(dy, prepared)):
            refuse(values=values, dy=dy)
        dx = _images(dy, convolution.in_channels, convolution.size, channels_last)
        _DX[dtype](
            self._index,
            prepared.dx,
            prepared.sizes,
            dy.shape[0],
            address(values),
            address(dy),
            dy.stride(),
            address(dx),
            dx.stride(),
            torch.get_num_threads(),
        )
        return dx

    def dvalues(self, prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        if not (_is_input(x, prepared) and _is_output(dy, prepared) and dy.shape[0] == x.shape[0]):
            refuse(dy=dy, x=x)
        dvalues = output(dy, prepared.nnz)
        _DVALUES[prepared.dtype](
            self._index,
            prepared.dvalues,
            prepared.sizes,
            x.shape[0],
            address(dy),
            dy.stride(),
            address(x),
            x.stride(),
            address(dvalues),
            torch.get_num_threads(),
        )
        return dvalues


def _images(like: Tensor, channels: int, size: tuple[int, int], channels_last: bool) -> Tensor:
    if channels_last:
        return output(like, like.shape[0], *size, channels).permute(0, 3, 1, 2)
    return output(like, like.shape[0], channels, *size)


def _is_input(x: Tensor, prepared: Prepared) -> bool:
    return _are_images(x, prepared.dtype, prepared.convolution.in_channels, prepared.convolution.size)


def _is_output(y: Tensor, prepared: Prepared) -> bool:
    return _are_images(y, prepared.dtype, prepared.convolution.out_channels, prepared.convolution.outputs)


def _are_images(images: Tensor, dtype: torch.dtype, channels: int, size: tuple[int, int]) -> bool:
    return (
        images.dtype is dtype
        and images.is_cpu
        and images.layout is torch.strided
        and images.dim() == 4
        and images.shape[1:] == (channels, *size)
    )
