"""The gradients of one instruction set."""

from __future__ import annotations

from collections.abc import Callable

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import KernelError
from offpath.kernels.operands import copied_or_refused, not_expanded
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared


class GradientVariant:
    """The gradients of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def sddmm(self, crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        dy, x, dvalues = not_expanded(dy), not_expanded(x), output(dy, col_indices.numel())
        operands = self._index, crow_indices, col_indices, dy, x, dvalues, torch.get_num_threads()
        if not _native.sddmm(*operands):
            named = {"crow_indices": crow_indices, "col_indices": col_indices, "dy": dy, "x": x}
            copied_or_refused(_native.sddmm, operands, named)
        return dvalues

    def tiled_sddmm(self, tiles: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_native.tiled_sddmm, tiles, dy, x)

    def bitmap_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_native.bitmap_dvalues, bitmap, dy, x)

    def filled_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_native.filled_dvalues, bitmap, dy, x)

    def _prepared_sddmm(self, product: Callable[..., bool], prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        dy, x, dvalues = not_expanded(dy), not_expanded(x), output(dy, prepared.nnz)
        operands = self._index, prepared.native, dy, x, dvalues, torch.get_num_threads()
        if not product(*operands):
            copied_or_refused(product, operands, {"dy": dy, "x": x})
        return dvalues

    def bitmap_dx(self, bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        return self._prepared_dx(_native.bitmap_dx, bitmap, values, dy)

    def filled_dx(self, bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        return self._prepared_dx(_native.filled_dx, bitmap, values, dy)

    def _prepared_dx(self, product: Callable[..., bool], bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        dy, dx = not_expanded(dy), output(dy, *dy.shape[:-1], bitmap.columns)
        operands = self._index, bitmap.native, values, dy, dx, torch.get_num_threads()
        if not product(*operands):
            copied_or_refused(product, operands, {"values": values, "dy": dy})
        return dx

    def backward(
        self,
        transpose: Prepared | None,
        tiles: Prepared | None,
        bitmap: Prepared | None,
        values: Tensor,
        dy: Tensor,
        x: Tensor,
        feature_major: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_weight = tiles or bitmap
        if of_weight is None or (transpose is None and bitmap is None):
            raise KernelError("expected tiles or a bitmap for dvalues, and a transposed plan or a bitmap for dx")
        dx, dvalues, dbias = _gradients(of_weight, values, x, feature_major)
        operands = (
            self._index,
            None if transpose is None else transpose.native,
            None if tiles is None else tiles.native,
            None if bitmap is None else bitmap.native,
            values,
            not_expanded(dy),
            x,
            dx,
            feature_major,
            dvalues,
            dbias,
            torch.get_num_threads(),
        )
        if not _native.backward(*operands):
            copied_or_refused(_native.backward, operands, {"values": values, "dy": dy, "x": x})
        return dx.t() if feature_major else dx, dvalues, dbias

    def bitmap_backward(
        self, bitmap: Prepared, values: Tensor, dy: Tensor, x: Tensor, /, fills_dx: bool, fills_dvalues: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dvalues, dbias = _gradients(bitmap, values, x, False)
        operands = (
            self._index,
            bitmap.native,
            values,
            not_expanded(dy),
            x,
            fills_dx,
            fills_dvalues,
            dx,
            dvalues,
            dbias,
            torch.get_num_threads(),
        )
        if not _native.bitmap_backward(*operands):
            copied_or_refused(_native.bitmap_backward, operands, {"values": values, "dy": dy, "x": x})
        return dx, dvalues, dbias


def _gradients(of_weight: Prepared, values: Tensor, x: Tensor, feature_major: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dx, dvalues and dbias."""
    leading = x.shape[:-1]
    sizes = (of_weight.columns, *leading) if feature_major else (*leading, of_weight.columns)
    return output(x, *sizes), output(values, of_weight.nnz), values.new_empty(of_weight.rows)
