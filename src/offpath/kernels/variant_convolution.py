"""The convolutions of one instruction set: memory for results taken, the native function called."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.convolution import Convolution, ConvolutionProducts
from offpath.kernels.operands import DTYPES, are_indices, refuse
from offpath.kernels.outputs import output
from offpath.kernels.plans import native_of_each_dtype

_MAKE_PLAN, _MAKE_TILES = map(native_of_each_dtype, ("make_convolution_plan", "make_convolution_tiles"))


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
        self.outputs = convolution.outputs
        axes = zip(*by_axis, self.outputs, strict=True)
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
        return self._made(_MAKE_TILES[self.dtype](self._isa, self.sizes, *self._indices, torch.get_num_threads()))

    @property
    def bytes(self) -> int:
        """Bytes of the plans made so far."""
        return sum(vars(self)[name].bytes for name in ("forward", "dx", "dvalues") if name in vars(self))

    def _plan(self, input_gradient: bool) -> Any:
        operands = self._isa, self.sizes, input_gradient, *self._indices
        return self._made(_MAKE_PLAN[self.dtype](*operands, torch.get_num_threads()))

    def _made(self, plan: Any) -> Any:
        if plan is None:
            refuse(crow_indices=self._indices[0], col_indices=self._indices[1])
        return plan


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
        y = _images(x, prepared.convolution.out_channels, prepared.outputs, channels_last)
        operands = self._index, prepared.forward, values, x, bias, y, torch.get_num_threads()
        if values.dtype is not prepared.dtype or not _native.convolve(*operands):
            refuse(values=values, x=x, bias=bias)
        return y

    def dx(self, prepared: Prepared, values: Tensor, dy: Tensor, channels_last: bool) -> Tensor:
        dx = _images(dy, prepared.convolution.in_channels, prepared.convolution.size, channels_last)
        operands = self._index, prepared.dx, values, dy, dx, torch.get_num_threads()
        if values.dtype is not prepared.dtype or not _native.convolution_dx(*operands):
            refuse(values=values, dy=dy)
        return dx

    def dvalues(self, prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        dvalues = output(dy, prepared.nnz)
        operands = self._index, prepared.dvalues, dy, x, dvalues, torch.get_num_threads()
        if dy.dtype is not prepared.dtype or not _native.convolution_dvalues(*operands):
            refuse(dy=dy, x=x)
        return dvalues


def _images(like: Tensor, channels: int, size: tuple[int, int], channels_last: bool) -> Tensor:
    if channels_last:
        return output(like, like.shape[0], *size, channels).permute(0, 3, 1, 2)
    return output(like, like.shape[0], channels, *size)
