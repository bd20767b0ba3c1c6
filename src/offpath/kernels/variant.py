"""The forward products of one instruction set, and what turns a weight dense and back.

Operands are checked, memory for the results is taken, the native function is called; `variant_*.py` do the same.
"""

from __future__ import annotations

import math

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.operands import address, are_indices, are_tokens, is_matrix, is_vector, refuse, token_strides
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared, native_of_each_dtype

_SPMM, _PLANNED_SPMM, _FILLED_SPMM = map(native_of_each_dtype, ("spmm", "planned_spmm", "filled_spmm"))
_BITMAP_SPMM, _EXPAND, _COMPRESS = map(native_of_each_dtype, ("bitmap_spmm", "expand", "compress"))


class Variant:
    """The forward products of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def spmm(
        self, crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        rows, dtype = crow_indices.shape[0] - 1, values.dtype
        if not (
            are_indices(crow_indices, col_indices)
            and is_vector(values, dtype, col_indices.shape[0])
            and are_tokens(x, dtype)
            and (bias is None or is_vector(bias, dtype, rows))
        ):
            refuse(crow_indices=crow_indices, col_indices=col_indices, values=values, x=x, bias=bias)
        x, x_strides = token_strides(x)
        *leading, columns = x.shape
        batch = math.prod(leading)
        y = output(values, *leading, rows)
        _SPMM[dtype](
            self._index,
            rows,
            columns,
            batch,
            address(crow_indices),
            address(col_indices),
            address(values),
            0 if bias is None else address(bias),
            address(x),
            *x_strides,
            address(y),
            torch.get_num_threads(),
        )
        return y

    def planned_spmm(
        self, plan: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
    ) -> Tensor:
        return self._prepared_spmm(_PLANNED_SPMM, plan, values, x, bias, feature_major)

    def filled_spmm(
        self, bitmap: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
    ) -> Tensor:
        return self._prepared_spmm(_FILLED_SPMM, bitmap, values, x, bias, feature_major)

    def bitmap_spmm(self, bitmap: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._prepared_spmm(_BITMAP_SPMM, bitmap, values, x, bias)

    def _prepared_spmm(
        self,
        functions: dict,
        prepared: Prepared,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        *layout: bool,
    ) -> Tensor:
        dtype = values.dtype
        if not (
            is_vector(values, dtype, prepared.nnz)
            and are_tokens(x, dtype)
            and x.shape[-1] == prepared.columns
            and (bias is None or is_vector(bias, dtype, prepared.rows))
        ):
            refuse(values=values, x=x, bias=bias)
        x, x_strides = token_strides(x)
        leading, rows = x.shape[:-1], prepared.rows
        batch = math.prod(leading)
        feature_major = True in layout
        y = output(values, rows, batch).t() if feature_major else output(values, *leading, rows)
        functions[dtype](
            self._index,
            prepared.native,
            batch,
            address(values),
            0 if bias is None else address(bias),
            address(x),
            *x_strides,
            address(y),
            *layout,
            torch.get_num_threads(),
        )
        return y

    def expand(self, bitmap: Prepared, values: Tensor) -> Tensor:
        if not is_vector(values, values.dtype, bitmap.nnz):
            refuse(values=values)
        dense = output(values, bitmap.rows, bitmap.columns)
        threads = torch.get_num_threads()
        _EXPAND[values.dtype](self._index, bitmap.native, address(values), address(dense), threads)
        return dense

    def compress(self, bitmap: Prepared, dense: Tensor) -> Tensor:
        if not (
            is_matrix(dense, dense.dtype) and dense.shape == (bitmap.rows, bitmap.columns) and dense.is_contiguous()
        ):
            refuse(dense=dense)
        values = output(dense, bitmap.nnz)
        threads = torch.get_num_threads()
        _COMPRESS[dense.dtype](self._index, bitmap.native, address(dense), address(values), threads)
        return values
