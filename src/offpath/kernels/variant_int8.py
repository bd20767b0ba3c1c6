"""The products with int8 values of one instruction set: operands checked, the native function called."""

from __future__ import annotations

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.backend import KernelError
from offpath.kernels.operands import address, is_matrix, is_vector, one_unit_stride, refuse
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared, native_of_each_dtype

_BITMAP, _PLANNED = native_of_each_dtype("bitmap_int8_spmm"), native_of_each_dtype("planned_int8_spmm")
_DOTS = native_of_each_dtype("int8_dots")
# Beyond it, 128 * 127 for every connection of a row could leave int32.
_LARGEST_WIDTH = 1 << 17


class Int8Variant:
    """The products with int8 values of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def bitmap_spmm(
        self, bitmap: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._spmm(_BITMAP, bitmap, values, scales, x, bias)

    def planned_spmm(
        self, plan: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self._spmm(_PLANNED, plan, values, scales, x, bias)

    def dots(self, bitmap: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bitmap.columns > _LARGEST_WIDTH:
            raise KernelError(
                f"expected at most {_LARGEST_WIDTH} inputs for sums in int32, got {bitmap.columns}; use "
                'activations="float"'
            )
        return self._spmm(_DOTS, bitmap, values, scales, x, bias)

    def _spmm(
        self, functions: dict, prepared: Prepared, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None
    ) -> Tensor:
        dtype = x.dtype
        if not (
            is_matrix(x, dtype)
            and x.shape[1] == prepared.columns
            and is_vector(values, torch.int8, prepared.nnz)
            and is_vector(scales, torch.float32, prepared.rows)
            and (bias is None or is_vector(bias, dtype, prepared.rows))
        ):
            refuse(values=values, scales=scales, x=x, bias=bias)
        x, x_strides = one_unit_stride(x)
        y = output(x, x.shape[0], prepared.rows)
        functions[dtype](
            self._index,
            prepared.native,
            x.shape[0],
            address(values),
            address(scales),
            0 if bias is None else address(bias),
            address(x),
            *x_strides,
            address(y),
            torch.get_num_threads(),
        )
        return y
