"""The gradients of one instruction set."""

from __future__ import annotations

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.backend import KernelError
from offpath.kernels.operands import address, are_indices, is_matrix, is_vector, one_unit_stride, refuse
from offpath.kernels.outputs import output
from offpath.kernels.plans import Prepared, native_of_each_dtype

_SDDMM, _TILED_SDDMM = native_of_each_dtype("sddmm"), native_of_each_dtype("tiled_sddmm")
_BITMAP_DX, _BITMAP_DVALUES = native_of_each_dtype("bitmap_dx"), native_of_each_dtype("bitmap_dvalues")
_FILLED_DX, _FILLED_DVALUES = native_of_each_dtype("filled_dx"), native_of_each_dtype("filled_dvalues")
_BACKWARD, _BITMAP_BACKWARD = native_of_each_dtype("backward"), native_of_each_dtype("bitmap_backward")


class GradientVariant:
    """The gradients of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def sddmm(self, crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        rows, dtype = crow_indices.shape[0] - 1, dy.dtype
        if not (are_indices(crow_indices, col_indices) and _fit(dy, x, dtype, rows)):
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

    def tiled_sddmm(self, tiles: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_TILED_SDDMM, tiles, dy, x)

    def bitmap_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_BITMAP_DVALUES, bitmap, dy, x)

    def filled_dvalues(self, bitmap: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        return self._prepared_sddmm(_FILLED_DVALUES, bitmap, dy, x)

    def _prepared_sddmm(self, functions: dict, prepared: Prepared, dy: Tensor, x: Tensor) -> Tensor:
        dtype = dy.dtype
        if not _fit(dy, x, dtype, prepared.rows, prepared.columns):
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
            and _fit(dy, x, dtype, rows, columns)
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

    def bitmap_backward(
        self, bitmap: Prepared, values: Tensor, dy: Tensor, x: Tensor, /, fills_dx: bool, fills_dvalues: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = values.dtype
        if not (is_vector(values, dtype, bitmap.nnz) and _fit(dy, x, dtype, bitmap.rows, bitmap.columns)):
            refuse(values=values, dy=dy, x=x)
        dy, dy_strides = one_unit_stride(dy)
        x, x_strides = one_unit_stride(x)
        batch = x.shape[0]
        dx, dvalues, dbias = output(x, batch, bitmap.columns), output(dy, bitmap.nnz), dy.new_empty(bitmap.rows)
        _BITMAP_BACKWARD[dtype](
            self._index,
            bitmap.native,
            batch,
            address(values),
            address(dy),
            *dy_strides,
            address(x),
            *x_strides,
            fills_dx,
            fills_dvalues,
            address(dx),
            address(dvalues),
            address(dbias),
            torch.get_num_threads(),
        )
        return dx, dvalues, dbias


def _fit(dy: Tensor, x: Tensor, dtype: torch.dtype, rows: int, columns: int | None = None) -> bool:
    """Whether these are the gradient of a layer's output and its input (of any width, or this), for as many tokens."""
    return (
        is_matrix(dy, dtype)
        and is_matrix(x, dtype)
        and dy.shape == (x.shape[0], rows)
        and (columns is None or x.shape[1] == columns)
    )
