"""What was made of a pattern for convolutions: one bitmap, and one set of plans for each size of images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.kernels.convolution import Convolution, ConvolutionProducts
from offpath.kernels.methods import PreparedMatrix
from offpath.ops.choice import CHOICES_KEPT, any_forced
from offpath.ops.convolution_choice import pays_densely
from offpath.ops.dense_convolution import DenseConvolution
from offpath.ops.library import is_vmapped

# Sizes of images whose plans are kept; making them takes about as long as a few images.
KEPT = 8


class PreparedConvolutions:
    """A matrix as the weight of convolutions, which lends them its bitmap; it must never change."""

    def __init__(self, matrix: PreparedMatrix) -> None:
        self._matrix = matrix
        self._made: OrderedDict[Hashable, Any] = OrderedDict()
        self._pays_densely: dict[Hashable, bool] = {}

    def forward(
        self,
        backend: Backend,
        convolution: Convolution,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        channels_last: bool,
        prefer: str,
    ) -> Tensor:
        """y, contiguous or channels-last."""
        if self._densely(backend, "forward", convolution, x, channels_last, prefer):
            y = self._dense(backend, convolution).forward(values, x, bias)
            return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return _products(backend).forward(self._plans(backend, convolution, x.dtype), values, x, bias, channels_last)

    def dx(
        self,
        backend: Backend,
        convolution: Convolution,
        values: Tensor,
        dy: Tensor,
        channels_last: bool,
        prefer: str,
    ) -> Tensor:
        """The gradient of x, contiguous or channels-last."""
        if self._densely(backend, "dx", convolution, dy, channels_last, prefer):
            shape = torch.Size((dy.shape[0], convolution.in_channels, *convolution.size))
            return self._dense(backend, convolution).dx(values, dy, shape, channels_last)
        return _products(backend).dx(self._plans(backend, convolution, dy.dtype), values, dy, channels_last)

    def dvalues(self, backend: Backend, convolution: Convolution, dy: Tensor, x: Tensor, prefer: str) -> Tensor:
        """The gradient of the values."""
        if self._densely(backend, "dvalues", convolution, x, is_channels_last(x), prefer):
            return self._dense(backend, convolution).dvalues(dy, x)
        return _products(backend).dvalues(self._plans(backend, convolution, x.dtype), dy, x)

    @property
    def bytes(self) -> int:
        """Bytes of the plans; the bitmap is the matrix's."""
        return sum(plans.bytes for plans in list(self._made.values()))  # a list: other threads may make some

    def _densely(
        self,
        backend: Backend,
        product: str,
        convolution: Convolution,
        like: Tensor,
        channels_last: bool,
        prefer: str,
    ) -> bool:
        """`pays_densely`, remembered as long as no method is forced."""
        forced = any_forced()
        key = backend.name, product, convolution, like.dtype, like.shape[0], channels_last, prefer
        # Once: hashing the sizes takes as long as the rest.
        found = None if forced else self._pays_densely.get(key)
        if found is None:
            nnz = self._matrix.nnz
            found = pays_densely(backend, product, convolution, nnz, like, channels_last, prefer)
            if not forced:
                if len(self._pays_densely) >= CHOICES_KEPT:
                    self._pays_densely.clear()
                self._pays_densely[key] = found
        return found

    def _plans(self, backend: Backend, convolution: Convolution, dtype: torch.dtype) -> Any:
        key = backend.name, convolution, dtype
        plans = self._made.pop(key, None)  # and back behind all others; another thread may make them meanwhile
        if plans is None:
            own = self._matrix
            plans = _products(backend).prepare(own.crow_indices, own.col_indices, convolution, dtype)
        self._made[key] = plans
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
        return plans

    def _dense(self, backend: Backend, convolution: Convolution) -> DenseConvolution:
        return DenseConvolution(backend, self._matrix.bitmap(backend), convolution)


def _products(backend: Backend) -> ConvolutionProducts:
    assert backend.convolutions is not None, "pays_densely is true of every product"
    return backend.convolutions


def is_channels_last(images: Tensor) -> bool:
    """Whether `nn.Conv2d` would answer these images [images, channels, height, width] channels-last."""
    if images.is_contiguous() or is_vmapped(images):  # which knows no other order
        return False
    return images.is_contiguous(memory_format=torch.channels_last)
