"""The products with int8 values of one instruction set: memory for results taken, the native function called."""

from __future__ import annotations

from collections.abc import Callable

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import KernelError
from offpath.kernels.operands import copied_or_refused
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared

# Beyond it, 128 * 127 for every connection of a row could leave int32.
_LARGEST_WIDTH = 1 << 17


class Int8Variant:
    """The products with int8 values of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def bitmap_spmm(
        self, bitmap: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._spmm(_native.bitmap_int8_spmm, bitmap, values, scales, x, bias)

    def planned_spmm(
        self, plan: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._spmm(_native.planned_int8_spmm, plan, values, scales, x, bias)

    def filled_spmm(
        self, bitmap: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._spmm(_native.filled_int8_spmm, bitmap, values, scales, x, bias)

    def dots(self, bitmap: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bitmap.columns > _LARGEST_WIDTH:
            raise KernelError(
                f"expected at most {_LARGEST_WIDTH} inputs for sums in int32, got {bitmap.columns}; use "
                'activations="float"'
            )
        return self._spmm(_native.int8_dots, bitmap, values, scales, x, bias)

    def _spmm(
        self,
        product: Callable[..., bool],
        prepared: Prepared,
        values: Tensor,
        scales: Tensor,
        x: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = output(x, *x.shape[:-1], prepared.rows)
        operands = self._index, prepared.native, values, scales, x, bias, y, torch.get_num_threads()
        if not product(*operands):
            copied_or_refused(product, operands, {"values": values, "scales": scales, "x": x, "bias": bias})
        return y
