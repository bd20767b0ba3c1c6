"""What is known of one pattern: what backends made of it, and which method computes each product."""

from __future__ import annotations

import math
from functools import cached_property, partial

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.kernels.methods import PreparedMatrix, PreparedWeight
from offpath.kernels.operands import on_device_of
from offpath.ops.choice import CHOICES_KEPT, any_forced, choose
from offpath.ops.library import as_rows
from offpath.ops.prepared_convolutions import PreparedConvolutions
from offpath.pattern import Pattern


class Prepared:
    """A private, checked copy of a pattern, what backends made of it and of its transpose, and the methods chosen."""

    def __init__(self, pattern: Pattern) -> None:
        self.shape, self.nnz, self.crow_indices = pattern.shape, pattern.nnz, pattern.crow_indices
        self.matrix = matrix = PreparedMatrix(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
        # Of the matrix, not of `self`, which keeps what is returned: a cycle would outlive the layer.
        self._weight = PreparedWeight(matrix, partial(_transpose, matrix))
        self._chosen: dict[tuple[str, str, int, torch.dtype, str, str | None, bool], str] = {}

    @cached_property
    def convolutions(self) -> PreparedConvolutions:
        """What backends made of the pattern as the weight of convolutions."""
        return PreparedConvolutions(self.matrix)

    def forward(
        self,
        backend: Backend,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        prefer: str,
        feature_major: bool,
        keep_dense: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x @ W.T + bias, for x [..., columns].

        With `keep_dense`, also the weight written out, if both this product and the gradient of x are computed with it.
        """
        if x.dim() != 2 and not (backend.native and x.dim() > 2):
            y, dense = self.forward(backend, values, as_rows(x), bias, prefer, feature_major, keep_dense)
            return y.view(*x.shape[:-1], y.shape[-1]), dense
        method = self._method(backend, "forward", x, prefer)
        dense = None
        if keep_dense and method == "dense" and self._method(backend, "dx", x, prefer) == "dense":
            dense = self.matrix.dense(backend, values)
        return self._weight.forward(backend, method, values, x, bias, feature_major, dense), dense

    def int8_forward(
        self,
        backend: Backend,
        values: Tensor,
        scales: Tensor,
        x: Tensor,
        bias: Tensor | None,
        prefer: str,
        activations: str,
    ) -> Tensor:
        """x @ W.T + bias for int8 values with a scale for each row of W, and x as it is or rounded to int8."""
        if activations == "int8":
            return backend.int8_dots(self.matrix.bitmap(backend), values, scales, x, bias)
        method = self._method(backend, "forward", x, prefer, int8=True)
        return self.matrix.int8_spmm(backend, method, values, scales, x, bias)

    def dx(self, backend: Backend, values: Tensor, dy: Tensor, prefer: str) -> Tensor:
        """dy @ W, for dy [batch, rows]."""
        return self._weight.dx(backend, self._method(backend, "dx", dy, prefer), values, dy)

    def dvalues(self, backend: Backend, dy: Tensor, x: Tensor, prefer: str) -> Tensor:
        """The entries of dy.T @ x that are connections."""
        return self._weight.dvalues(backend, self._method(backend, "dvalues", x, prefer), dy, x)

    def backward(
        self,
        backend: Backend,
        values: Tensor,
        dy: Tensor,
        x: Tensor,
        prefer: str,
        feature_major: bool,
        dense: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dvalues, dbias), where dbias is the sum of dy over the batch; `dense` is what `forward` kept."""
        of_x = self._method(backend, "dx", dy, prefer)
        of_values = self._method(backend, "dvalues", x, prefer, of_x)
        return self._weight.backward(backend, of_x, of_values, values, dy, x, feature_major, dense)

    @property
    def bytes(self) -> int:
        """Bytes of the copy, its transpose, the plans and the bitmaps."""
        return self._weight.bytes + (self.convolutions.bytes if "convolutions" in vars(self) else 0)

    def _method(
        self,
        backend: Backend,
        product: str,
        operand: Tensor,
        prefer: str,
        dx_method: str | None = None,
        int8: bool = False,
    ) -> str:
        batch = operand.shape[0] if operand.dim() == 2 else math.prod(operand.shape[:-1])
        key = backend.name, product, batch, operand.dtype, prefer, dx_method, int8
        if any_forced():
            return self._choose(backend, product, batch, operand, prefer, dx_method, int8)
        method = self._chosen.get(key)
        if method is None:
            method = self._choose(backend, product, batch, operand, prefer, dx_method, int8)
            # While a graph is captured, costs are calculated where they have not been measured.
            if not (operand.is_cuda and torch.cuda.is_current_stream_capturing()):
                if len(self._chosen) >= CHOICES_KEPT:
                    self._chosen.clear()
                self._chosen[key] = method
        return method

    def _choose(
        self,
        backend: Backend,
        product: str,
        batch: int,
        operand: Tensor,
        prefer: str,
        dx_method: str | None,
        int8: bool,
    ) -> str:
        size = (*self.shape, self.nnz, batch)
        with on_device_of(operand):
            return choose(backend, product, *size, operand.dtype, prefer, dx_method, int8)


def _transpose(matrix: PreparedMatrix) -> PreparedMatrix:
    shape = matrix.rows, matrix.columns
    crow_indices, col_indices, permutation = Pattern(shape, matrix.crow_indices, matrix.col_indices).transpose()
    return PreparedMatrix(crow_indices, col_indices, matrix.rows, permutation)
