"""The products on sparse rows of one instruction set: memory for the results taken, the native function called."""

from __future__ import annotations

from functools import partial

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import KernelError
from offpath.kernels.operands import copied_or_refused, in_own_dtype, not_expanded, refuse, refuse_freed, wide
from offpath.kernels.outputs import output
from offpath.kernels.reference_rows import check_k
from offpath.kernels.row_operands import copied_or_refused_rows
from offpath.kernels.row_products import RowProducts
from offpath.kernels.variant_sparse_rows import sparse_dots, sparse_matmul, sparse_weight_gradient


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
        y = output(values, max(crow_indices.numel(), 1) - 1, *weight.shape[1:])
        operands = self._index, crow_indices, indices, values, weight, y, torch.get_num_threads()
        if not _native.rows_matmul(*operands):
            named = {"values": values, "weight": weight}
            copied_or_refused_rows(_native.rows_matmul, operands, crow_indices, indices, _count(weight), named)
        return y

    def dots(self, crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        dy, dots = not_expanded(dy), output(dy, indices.numel())
        operands = self._index, crow_indices, indices, dy, weight, dots, torch.get_num_threads()
        if not _native.rows_dots(*operands):
            named = {"dy": dy, "weight": weight}
            copied_or_refused_rows(_native.rows_dots, operands, crow_indices, indices, _count(weight), named)
        return dots

    def weight_gradient(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int
    ) -> Tensor:
        dy, gradient = not_expanded(dy), output(values, columns, *dy.shape[1:])
        self._weight_gradient(crow_indices, indices, values, dy, gradient, False)
        return gradient

    def add_weight_gradient(
        self, crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, buffer: Tensor
    ) -> None:
        if buffer.dim() != 2 or buffer.layout is not torch.strided:
            refuse(buffer=buffer, dy=dy)
        has_rows = buffer.stride(1) == 1 and buffer.stride(0) >= buffer.shape[1]  # which do not overlap
        refuse_freed(buffer=buffer)
        rows = buffer if has_rows else buffer.contiguous()
        self._weight_gradient(crow_indices, indices, values, dy, rows, True)
        if rows is not buffer:
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
        operands = self._index, crow_indices, indices, values, dy, gradient, add, torch.get_num_threads()
        if not _native.rows_weight_gradient(*operands):
            rows, named = (crow_indices, indices, gradient.shape[0]), {"values": values, "dy": dy}
            copied_or_refused_rows(_native.rows_weight_gradient, operands, *rows, named, gradient=gradient)

    def counts(self, indices: Tensor, columns: int) -> Tensor:
        counts = indices.new_empty(columns)
        if not _native.count_indices(indices, counts):
            crow_indices = torch.tensor([0, indices.numel()], dtype=torch.int32, device="cpu")
            copied_or_refused_rows(_native.count_indices, (indices, counts), crow_indices, indices, columns, {})
        return counts

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_k(k, _columns(x))
        values, indices = x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)
        operands = self._index, x, k, values, indices, torch.get_num_threads()
        if not _native.topk(*operands):
            copied_or_refused(_native.topk, operands, {"x": x})
        return values, indices

    def batch_topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        _columns(x)
        check_k(k, min(x.numel(), 2**31 - 1))
        crow_indices = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
        indices, values = x.new_empty(k, dtype=torch.int32), x.new_empty(k)
        operands = self._index, x, k, crow_indices, indices, values, torch.get_num_threads()
        if not _native.batch_topk(*operands):
            copied_or_refused(_native.batch_topk, operands, {"x": x})
        return crow_indices, indices, values

    def above(self, x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        _columns(x)
        crow_indices, threads = x.new_empty(x.shape[0] + 1, dtype=torch.int32), torch.get_num_threads()
        nnz = _native.count_above(self._index, x, threshold, crow_indices, threads)
        if nnz is None:
            refuse_freed(x=x, threshold=threshold)
            x, threshold = x.contiguous(), None if threshold is None else threshold.contiguous()
            nnz = _native.count_above(self._index, x, threshold, crow_indices, threads)
            if nnz is None:
                refuse(x=x, threshold=threshold)
        if nnz >= 2**31:
            raise KernelError(f"expected at most 2^31 - 1 entries, got {nnz}; split the batch")
        indices, values = x.new_empty(nnz, dtype=torch.int32), x.new_empty(nnz)
        if not _native.take_above(self._index, x, threshold, crow_indices, indices, values, threads):
            refuse(x=x, threshold=threshold)
        return crow_indices, indices, values

    def encode_topk(self, x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        check_k(k, weight.shape[0])
        values, indices = x.new_empty(*x.shape[:-1], k), x.new_empty(*x.shape[:-1], k, dtype=torch.int32)
        operands = self._index, x, weight, bias, k, values, indices, torch.get_num_threads()
        if not _native.encode_topk(*operands):
            named = {"x": x, "weight": weight, "bias": bias}
            copied_or_refused(_native.encode_topk, operands, named, least_dims=1)
        return values, indices


def written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """`RowProducts.written_out`: moves numbers about, and is the same for every instruction set."""
    dense = output(values, max(crow_indices.numel(), 1) - 1, columns)
    operands = crow_indices, indices, values, dense, torch.get_num_threads()
    if not _native.rows_written_out(*operands):
        copied_or_refused_rows(_native.rows_written_out, operands, crow_indices, indices, columns, {"values": values})
    return dense


def dense_dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """`RowProducts.dense_dots`: torch multiplies."""
    fits = dy.dtype is weight.dtype and dy.dim() == weight.dim() == 2 and dy.shape[1] == weight.shape[1]
    if not (fits and dy.is_cpu and weight.is_cpu):
        refuse(dy=dy, weight=weight)
    with in_own_dtype(dy):
        products = dy @ weight.t()
    dots = output(dy, indices.numel())
    operands = crow_indices, indices, products, dots, torch.get_num_threads()
    if not _native.rows_picked(*operands):
        named = {"dy": dy, "weight": weight}
        copied_or_refused_rows(_native.rows_picked, operands, crow_indices, indices, _count(weight), named)
    return dots


def _count(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() else 0


def _columns(x: Tensor) -> int:
    """Of scores; raises `KernelError` for what are none."""
    if x.dim() != 2:
        refuse(x=x)
    if x.shape[1] >= 2**31:
        raise KernelError(f"expected fewer than 2^31 columns, got {x.shape[1]}")
    return x.shape[1]
