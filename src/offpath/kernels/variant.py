"""The forward products of one instruction set, and what turns a weight dense and back.

Memory for the results is taken and the native function is called, which says no to operands that do not fit;
`variant_*.py` do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.operands import copied_or_refused
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared


class Variant:
    """The forward products of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def spmm(
        self, crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        y = output(values, *x.shape[:-1], max(crow_indices.numel(), 1) - 1)
        operands = self._index, crow_indices, col_indices, values, x, bias, y, torch.get_num_threads()
        if not _native.spmm(*operands):
            named = {"crow_indices": crow_indices, "col_indices": col_indices, "values": values, "x": x, "bias": bias}
            copied_or_refused(_native.spmm, operands, named)
        return y

    def planned_spmm(
        self, plan: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
    ) -> Tensor:
        return self._prepared_spmm(_native.planned_spmm, plan, values, x, bias, feature_major)

    def filled_spmm(
        self, bitmap: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
    ) -> Tensor:
        return self._prepared_spmm(_native.filled_spmm, bitmap, values, x, bias, feature_major)

    def bitmap_spmm(self, bitmap: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._prepared_spmm(_native.bitmap_spmm, bitmap, values, x, bias)

    def _prepared_spmm(
        self,
        product: Callable[..., bool],
        prepared: Prepared,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        *layout: bool,
    ) -> Tensor:
        leading, rows = x.shape[:-1], prepared.rows
        y = output(values, rows, math.prod(leading)) if True in layout else output(values, *leading, rows)
        operands = self._index, prepared.native, values, x, bias, y, *layout, torch.get_num_threads()
        if not product(*operands):
            copied_or_refused(product, operands, {"values": values, "x": x, "bias": bias})
        return y.t() if True in layout else y

    def expand(self, bitmap: Prepared, values: Tensor) -> Tensor:
        dense = output(values, bitmap.rows, bitmap.columns)
        operands = self._index, bitmap.native, values, dense, torch.get_num_threads()
        if not _native.expand(*operands):
            copied_or_refused(_native.expand, operands, {"values": values})
        return dense

    def compress(self, bitmap: Prepared, dense: Tensor) -> Tensor:
        values = output(dense, bitmap.nnz)
        operands = self._index, bitmap.native, dense, values, torch.get_num_threads()
        if not _native.compress(*operands):
            copied_or_refused(_native.compress, operands, {"dense": dense})
        return values
