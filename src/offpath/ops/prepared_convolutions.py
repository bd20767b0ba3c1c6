"""What was made of a pattern for convolutions: one set of plans for each size of images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.kernels.convolution import Convolution, ConvolutionProducts
from offpath.ops.choice import any_forced
from offpath.ops.convolution_choice import pays_densely
from offpath.ops.dense_convolution import DenseConvolution
from offpath.pattern import Pattern

# Sizes of images whose plans are kept; making them takes about as long as a few images.
KEPT = 8


class PreparedConvolutions:
    """A pattern as the weight of convolutions; it must never change."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
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
        if self._densely(backend, "forward", convolution, values.numel(), x, channels_last, prefer):
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
        if self._densely(backend, "dx", convolution, values.numel(), dy, channels_last, prefer):
            shape = torch.Size((dy.shape[0], convolution.in_channels, *convolution.size))
            return self._dense(backend, convolution).dx(values, dy, shape, channels_last)
        return _products(backend).dx(self._plans(backend, convolution, dy.dtype), values, dy, channels_last)

    def dvalues(self, backend: Backend, convolution: Convolution, dy: Tensor, x: Tensor, prefer: str) -> Tensor:
        """The gradient of the values."""
        if self._densely(backend, "dvalues", convolution, self._pattern.nnz, x, is_channels_last(x), prefer):
            return self._dense(backend, convolution).dvalues(dy, x)
        return _products(backend).dvalues(self._plans(backend, convolution, x.dtype), dy, x)

    @property
    def bytes(self) -> int:
        """Bytes of the plans and bitmaps."""
        return sum(made.bytes for made in self._made.values())

    def _densely(
        self,
        backend: Backend,
        product: str,
        convolution: Convolution,
        nnz: int,
        like: Tensor,
        channels_last: bool,
        prefer: str,
    ) -> bool:
        """`pays_densely`, remembered as long as no method is forced."""
        if any_forced():
            return pays_densely(backend, product, convolution, nnz, like, channels_last, prefer)
        key = backend.name, product, convolution, like.dtype, like.shape[0], channels_last, prefer
        found = self._pays_densely.get(key)  # once: hashing the sizes takes as long as the rest
        if found is None:
            found = pays_densely(backend, product, convolution, nnz, like, channels_last, prefer)
            self._pays_densely[key] = found
        return found

    def _plans(self, backend: Backend, convolution: Convolution, dtype: torch.dtype) -> Any:
        own = self._pattern
        return self._once(
            (backend.name, convolution, dtype),
            lambda: _products(backend).prepare(own.crow_indices, own.col_indices, convolution, dtype),
        )

    def _dense(self, backend: Backend, convolution: Convolution) -> DenseConvolution:
        return self._once(
            (backend.name, convolution, "dense"), lambda: DenseConvolution(backend, self._pattern, convolution)
        )

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._made.get(key)
        if found is not None:
            self._made.move_to_end(key)
            return found
        self._made[key] = made = make()
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made


def _products(backend: Backend) -> ConvolutionProducts:
    assert backend.convolutions is not None, "pays_densely is true of every product"
    return backend.convolutions


def is_channels_last(images: Tensor) -> bool:
    """Whether `nn.Conv2d` would answer these images [images, channels, height, width] channels-last."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
