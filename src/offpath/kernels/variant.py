"""The products of one instruction set: operands checked, memory for the results taken, the native function called."""

from __future__ import annotations

import math

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.backend import KernelError
from offpath.kernels.operands import (
    address,
    are_indices,
    are_tokens,
    is_matrix,
    is_vector,
    one_unit_stride,
    refuse,
    token_strides,
)
from offpath.kernels.plans import Prepared, native_of_each_dtype

# Outputs of this size are taken from memory that earlier ones gave back: the system clears fresh pages at their
# first touch, which costs as much as a product at 90 %.
_KEPT_OUTPUT_BYTES = 1 << 18


_SPMM, _PLANNED_SPMM, _SDDMM = (
    native_of_each_dtype("spmm"),
    native_of_each_dtype("planned_spmm"),
    native_of_each_dtype("sddmm"),
)
_TILED_SDDMM, _BACKWARD = native_of_each_dtype("tiled_sddmm"), native_of_each_dtype("backward")
_FILLED_SPMM, _FILLED_DX, _FILLED_DVALUES = map(native_of_each_dtype, ("filled_spmm", "filled_dx", "filled_dvalues"))
_BITMAP_DX, _BITMAP_DVALUES = native_of_each_dtype("bitmap_dx"), native_of_each_dtype("bitmap_dvalues")
_BITMAP_SPMM, _EXPAND, _COMPRESS = map(native_of_each_dtype, ("bitmap_spmm", "expand", "compress"))
_TAKE_OUTPUT = native_of_each_dtype("take_output")


class Variant:
    """The products of the variant at `index` of `isas()`."""

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

    def sddmm(self, crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        rows, dtype = crow_indices.shape[0] - 1, dy.dtype
        if not (
            are_indices(crow_indices, col_indices)
            and is_matrix(dy, dtype)
            and is_matrix(x, dtype)
            and dy.shape == (x.shape[0], rows)
        ):
            refuse(crow_indices=crow_indices, col_indices=col_indices, dy=dy, x=x)
        dy, dy_strides = one_unit_stride(dy)
        x, x_strides = one_unit_stride(x)
        batch, columns = x.shape
        dvalues = output(dy, col_indices.shape[0])
        _SDDMM[dtype](
            self._index,
            rows,
            columns,
            batch,
            address(crow_indices),
            address(col_indices),
            address(dy),
            *dy_strides,
            address(x),
            *x_strides,
            address(dvalues),
            torch.get_num_threads(),
        )
        return dvalues

    def planned_spmm(
        self, plan: Prepared, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
    ) -> Tensor:
        return self._prepared_spmm(_PLANNED_SPMM, plan, values, x, bias, feature_major)

    def tiled_sddmm(self, tiles: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_TILED_SDDMM, tiles, dy, x)

    def bitmap_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_BITMAP_DVALUES, bitmap, dy, x)

    def filled_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_FILLED_DVALUES, bitmap, dy, x)

    def _prepared_sddmm(self, functions: dict, prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        dtype = dy.dtype
        if not (
            is_matrix(dy, dtype)
            and is_matrix(x, dtype)
            and dy.shape == (x.shape[0], prepared.rows)
            and x.shape[1] == prepared.columns
        ):
            refuse(dy=dy, x=x)
        dy, dy_strides = one_unit_stride(dy)
        x, x_strides = one_unit_stride(x)
        dvalues = output(dy, prepared.nnz)
        functions[dtype](
            self._index,
            prepared.native,
            x.shape[0],
            address(dy),
            *dy_strides,
            address(x),
            *x_strides,
            address(dvalues),
            torch.get_num_threads(),
        )
        return dvalues

    def bitmap_dx(self, bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        return self._prepared_dx(_BITMAP_DX, bitmap, values, dy)

    def filled_dx(self, bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        return self._prepared_dx(_FILLED_DX, bitmap, values, dy)

    def _prepared_dx(self, functions: dict, bitmap: Prepared, values: Tensor, dy: Tensor) -> Tensor:
        dtype = values.dtype
        if not (is_vector(values, dtype, bitmap.nnz) and is_matrix(dy, dtype) and dy.shape[1] == bitmap.rows):
            refuse(values=values, dy=dy)
        dy, dy_strides = one_unit_stride(dy)
        dx = output(dy, dy.shape[0], bitmap.columns)
        functions[dtype](
            self._index,
            bitmap.native,
            dy.shape[0],
            address(values),
            address(dy),
            *dy_strides,
            address(dx),
            torch.get_num_threads(),
        )
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
        dtype = values.dtype
        of_weight = tiles or bitmap
        if of_weight is None or (transpose is None and bitmap is None):
            raise KernelError("expected tiles or a bitmap for dvalues, and a transposed plan or a bitmap for dx")
        rows, columns, nnz = of_weight.rows, of_weight.columns, of_weight.nnz
        if not (
            is_vector(values, dtype, nnz)
            and is_matrix(dy, dtype)
            and is_matrix(x, dtype)
            and dy.shape == (x.shape[0], rows)
            and x.shape[1] == columns
            and (transpose is None or (transpose.rows, transpose.columns, transpose.nnz) == (columns, rows, nnz))
            and (bitmap is None or (bitmap.rows, bitmap.columns, bitmap.nnz) == (rows, columns, nnz))
        ):
            refuse(values=values, dy=dy, x=x)
        dy, dy_strides = one_unit_stride(dy)
        x, x_strides = one_unit_stride(x)
        batch = x.shape[0]
        dx = output(x, columns, batch).t() if feature_major else output(x, batch, columns)
        dvalues = output(dy, nnz)
        dbias = dy.new_empty(rows)
        _BACKWARD[dtype](
            self._index,
            tuple(None if made is None else made.native for made in (transpose, tiles, bitmap)),
            rows,
            columns,
            nnz,
            batch,
            address(values),
            address(dy),
            *dy_strides,
            address(x),
            *x_strides,
            address(dx),
            feature_major,
            address(dvalues),
            address(dbias),
            torch.get_num_threads(),
        )
        return dx, dvalues, dbias

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


def output(like: Tensor, *shape: int) -> Tensor:
    if math.prod(shape) * like.element_size() < _KEPT_OUTPUT_BYTES:
        return like.new_empty(*shape)  # half a microsecond less than with a tuple
    output = _TAKE_OUTPUT[like.dtype](shape)
    # torch.utils.deterministic is a module whose class is exchanged at import, which type checkers cannot see.
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        output.fill_(torch.nan)  # as torch does with the memory that it allocates
    return output
