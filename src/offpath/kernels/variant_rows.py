"""The products on sparse rows of one instruction set: operands checked, memory taken, the native function called."""

from __future__ import annotations

from functools import partial

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import KernelError
from offpath.kernels.operands import address, in_own_dtype, is_matrix, is_vector, one_unit_stride, refuse, wide
from offpath.kernels.outputs import output
from offpath.kernels.plans import native_of_each_dtype
from offpath.kernels.reference_rows import check_k
from offpath.kernels.row_operands import check_rows_fit, contiguous_rows, has_rows
from offpath.kernels.row_products import RowProducts
from offpath.kernels.variant_sparse_rows import sparse_dots, sparse_matmul, sparse_weight_gradient

_MATMUL, _DOTS = native_of_each_dtype("rows_matmul"), native_of_each_dtype("rows_dots")
_WEIGHT_GRADIENT = native_of_each_dtype("rows_weight_gradient")
_WRITTEN_OUT, _PICKED = native_of_each_dtype("rows_written_out"), native_of_each_dtype("rows_picked")
_TOPK, _BATCH_TOPK = native_of_each_dtype("topk"), native_of_each_dtype("batch_topk")
_COUNT_ABOVE, _TAKE_ABOVE = native_of_each_dtype("count_above"), native_of_each_dtype("take_above")
_ENCODE_TOPK = native_of_each_dtype("encode_topk")


class RowVariant:
    """The products on sparse rows of the variant at `index` of `isas()`."""

    def __init__(self, index: int) -> None:
        self._index = index

    def products(self) -> RowProducts:
        return RowProducts(
            self.matmul,
            self.dots,
            self.weight_gradient,
            self.add_weight_gradient,
            partial(sparse_matmul, self._index),
            partial(sparse_dots, self._index),
            partial(sparse_weight_gradient, self._index),
            self.counts,
            self.topk,
            self.batch_topk,
            self.above,
            self.encode_topk,
            written_out,
            dense_dots,
            self.encoder_gradients,
        )

    def matmul(self, crow_indices: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        crow_indices, indices, values = crow_indices.contiguous(), indices.contiguous(), values.contiguous()
        if not (is_vector(values, values.dtype, indices.shape[0]) and is_matrix(weight, values.dtype)):
            refuse(values=values, weight=weight)
        check_rows_fit(crow_indices, indices, weight.shape[0])
        weight = contiguous_rows(weight)
        y = output(values, crow_indices.shape[0] - 1, weight.shape[1])
        _MATMUL[values.dtype](
            self._index,
            *y.shape,
            address(crow_indices),
            address(indices),
            address(values),
            address(weight),
            weight.stride(0),
            address(y),
            torch.get_num_threads(),
        )
        return y

    def dots(self, crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        crow_indices, indices = crow_indices.contiguous(), indices.contiguous()
        rows = crow_indices.shape[0] - 1
        _check_pairs(rows, dy, weight)
        check_rows_fit(crow_indices, indices, weight.shape[0])
        dy, weight = contiguous_rows(dy), contiguous_rows(weight)
        dots = output(dy, indices.shape[0])
        _DOTS[dy.dtype](
            self._index,
            rows,
            dy.shape[1],
            address(crow_indices),
            address(indices),
            address(dy),
            dy.stride(0),
            address(weight),
            weight.stride(0),
            address(dots),
            torch.get_num_threads(),
        )
        return dots

    def weight_gradient(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int
    ) -> Tensor:
        gradient = output(values, columns, dy.shape[1])
        self._weight_gradient(crow_indices, indices, values, dy, gradient, False)
        return gradient

    def add_weight_gradient(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, buffer: Tensor
    ) -> None:
        if not (is_matrix(buffer, values.dtype) and buffer.shape[1] == dy.shape[1]):
            refuse(buffer=buffer, dy=dy)
        if has_rows(buffer):
            self._weight_gradient(crow_indices, indices, values, dy, buffer, True)
        else:
            rows = buffer.contiguous()
            self._weight_gradient(crow_indices, indices, values, dy, rows, True)
            buffer.copy_(rows)

    def encoder_gradients(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int
    ) -> tuple[Tensor, Tensor]:
        of_weight = self.weight_gradient(crow_indices, indices, values, dy, columns)
        # One by one, in the order of the entries: where they are few, nothing else is as quick.
        sums = wide(values).new_zeros(columns).index_add(0, indices, wide(values))
        return of_weight, sums.to(values.dtype)

    def _weight_gradient(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, gradient: Tensor, add: bool
    ) -> None:
        crow_indices, indices, values = crow_indices.contiguous(), indices.contiguous(), values.contiguous()
        rows = crow_indices.shape[0] - 1
        if not (
            is_vector(values, values.dtype, indices.shape[0]) and is_matrix(dy, values.dtype) and dy.shape[0] == rows
        ):
            refuse(values=values, dy=dy)
        check_rows_fit(crow_indices, indices, gradient.shape[0])
        dy = contiguous_rows(dy)
        _WEIGHT_GRADIENT[values.dtype](
            self._index,
            rows,
            *gradient.shape,
            address(crow_indices),
            address(indices),
            address(values),
            address(dy),
            dy.stride(0),
            address(gradient),
            gradient.stride(0),
            add,
            torch.get_num_threads(),
        )

    def counts(self, indices: Tensor, columns: int) -> Tensor:
        indices = indices.contiguous()
        crow_indices = torch.tensor([0, indices.shape[0]], dtype=torch.int32, device="cpu")
        check_rows_fit(crow_indices, indices, columns)
        counts = indices.new_empty(columns)
        _native.count_indices(indices.shape[0], columns, address(indices), address(counts))
        return counts

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        x = _scores(x)
        check_k(k, x.shape[1])
        values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)
        _TOPK[x.dtype](
            self._index,
            *x.shape,
            k,
            address(x),
            x.stride(0),
            address(values),
            address(indices),
            torch.get_num_threads(),
        )
        return values, indices

    def batch_topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        x = _scores(x)
        check_k(k, min(x.numel(), 2**31 - 1))
        crow_indices, indices, values = _new_rows(x, k)
        _BATCH_TOPK[x.dtype](
            self._index,
            *x.shape,
            k,
            address(x),
            x.stride(0),
            address(crow_indices),
            address(indices),
            address(values),
            torch.get_num_threads(),
        )
        return crow_indices, indices, values

    def above(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x, threshold = _scores(x), None if threshold is None else threshold.contiguous()
        if threshold is not None and not is_vector(threshold, x.dtype, x.shape[1]):
            refuse(x=x, threshold=threshold)
        crow_indices = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
        operands = (address(x), x.stride(0), 0 if threshold is None else address(threshold), address(crow_indices))
        nnz = _COUNT_ABOVE[x.dtype](self._index, *x.shape, *operands, torch.get_num_threads())
        if nnz >= 2**31:
            raise KernelError(f"expected at most 2^31 - 1 entries, got {nnz}; split the batch")
        indices, values = x.new_empty(nnz, dtype=torch.int32), x.new_empty(nnz)
        _TAKE_ABOVE[x.dtype](
            self._index, *x.shape, *operands, address(indices), address(values), torch.get_num_threads()
        )
        return crow_indices, indices, values

    def encode_topk(self, x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        dtype, latents = x.dtype, weight.shape[0]
        if not (
            is_matrix(x, dtype)
            and is_matrix(weight, dtype)
            and x.shape[1] == weight.shape[1]
            and (bias is None or (bias.dtype is dtype and bias.is_cpu and bias.shape == (latents,)))
        ):
            refuse(x=x, weight=weight, bias=bias)
        check_k(k, latents)
        x, x_strides = one_unit_stride(x)
        weight, bias = contiguous_rows(weight), None if bias is None else bias.contiguous()
        values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)
        _ENCODE_TOPK[dtype](
            self._index,
            *x.shape,
            latents,
            k,
            address(x),
            *x_strides,
            address(weight),
            weight.stride(0),
            0 if bias is None else address(bias),
            address(values),
            address(indices),
            torch.get_num_threads(),
        )
        return values, indices


def written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """`RowProducts.written_out`: moves numbers about, and is the same for every instruction set."""
    crow_indices, indices, values = crow_indices.contiguous(), indices.contiguous(), values.contiguous()
    if values.dtype not in _WRITTEN_OUT or not is_vector(values, values.dtype, indices.shape[0]):
        refuse(values=values)
    check_rows_fit(crow_indices, indices, columns)
    dense = output(values, crow_indices.shape[0] - 1, columns)
    _WRITTEN_OUT[values.dtype](
        *dense.shape,
        address(crow_indices),
        address(indices),
        address(values),
        address(dense),
        torch.get_num_threads(),
    )
    return dense


def dense_dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """`RowProducts.dense_dots`: torch multiplies."""
    crow_indices, indices = crow_indices.contiguous(), indices.contiguous()
    _check_pairs(crow_indices.shape[0] - 1, dy, weight)
    check_rows_fit(crow_indices, indices, weight.shape[0])
    with in_own_dtype(dy):
        products = dy @ weight.t()
    dots = output(dy, indices.shape[0])
    _PICKED[dy.dtype](
        *products.shape,
        address(crow_indices),
        address(indices),
        address(products),
        address(dots),
        torch.get_num_threads(),
    )
    return dots


def _check_pairs(rows: int, dy: Tensor, weight: Tensor) -> None:
    fits = is_matrix(dy, dy.dtype) and is_matrix(weight, dy.dtype)
    if not (fits and dy.shape == (rows, weight.shape[1])):
        refuse(dy=dy, weight=weight)


def _scores(x: Tensor) -> Tensor:
    if not is_matrix(x, x.dtype):
        refuse(x=x)
    if x.shape[1] >= 2**31:
        raise KernelError(f"expected fewer than 2^31 columns, got {x.shape[1]}")
    return contiguous_rows(x)


def _new_rows(like: Tensor, nnz: int) -> tuple[Tensor, Tensor, Tensor]:
    crow_indices = like.new_empty(like.shape[0] + 1, dtype=torch.int32)
    return crow_indices, like.new_empty(nnz, dtype=torch.int32), like.new_empty(nnz)
