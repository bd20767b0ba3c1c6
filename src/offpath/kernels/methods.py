"""The ways to compute each product of a prepared matrix: by name, so that they can be compared, chosen and forced."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.kernels.backend import Backend

# Products of a layer: y = x W^T, the gradient of x, the gradient of the values.
PRODUCTS = ("forward", "dx", "dvalues")
# bucketed: over a plan, for many tokens. row-wise: straight over the indices. bitmap: for a few tokens, over one bit
# per position. dense: write the weight out, and leave the rest to torch; absent connections are zeros there, so an
# infinite input becomes NaN as in `nn.Linear`.
METHODS = {
    "forward": ("bucketed", "row-wise", "bitmap", "dense"),
    "dx": ("bucketed", "row-wise", "bitmap", "dense"),
    "dvalues": ("row-wise", "dense"),
}
# Those whose memory is not O(nnz + rows x columns / 64).
DENSE_METHODS = ("dense",)


class PreparedMatrix:
    """A canonical CSR matrix and what backends made of it; its tensors must never change.

    With a `permutation`, slot s has the value `values[permutation[s]]`.
    """

    def __init__(
        self, crow_indices: Tensor, col_indices: Tensor, columns: int, permutation: Tensor | None = None
    ) -> None:
        self.crow_indices, self.col_indices = crow_indices, col_indices
        self.rows, self.columns = crow_indices.shape[0] - 1, columns
        self.permutation = permutation
        self._made: dict[tuple[str, torch.dtype | None], Any] = {}

    def spmm(self, backend: Backend, method: str, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ W.T + bias for x [batch, columns], by one of METHODS."""
        if method == "bucketed":
            return backend.planned_spmm(self._plan(backend, values.dtype), values, x, bias)
        if self.permutation is not None:
            values = values.index_select(0, self.permutation)
        if method == "row-wise":
            return backend.spmm(self.crow_indices, self.col_indices, values, x, bias)
        if method == "bitmap":
            return backend.bitmap_spmm(self._bitmap(backend), values, x, bias)
        return linear(x, self.dense(backend, values), bias)

    def sddmm(self, backend: Backend, method: str, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient of the values for dy [batch, rows] and x [batch, columns], by one of METHODS."""
        if method == "dense":
            return backend.compress(self._bitmap(backend), dy.t() @ x)
        return backend.sddmm(self.crow_indices, self.col_indices, dy, x)

    def dense(self, backend: Backend, values: Tensor) -> Tensor:
        """The matrix [rows, columns] written out."""
        return backend.expand(self._bitmap(backend), values)

    @property
    def bytes(self) -> int:
        """Bytes of the plans and bitmaps."""
        return sum(made.bytes for made in self._made.values())

    def _plan(self, backend: Backend, dtype: torch.dtype) -> Any:
        plan = self._made.get((backend.name, dtype))
        if plan is None:
            plan = backend.plan(self.crow_indices, self.col_indices, self.columns, dtype, self.permutation)
            self._made[backend.name, dtype] = plan
        return plan

    def _bitmap(self, backend: Backend) -> Any:
        bitmap = self._made.get((backend.name, None))
        if bitmap is None:
            bitmap = backend.bitmap(self.crow_indices, self.col_indices, self.columns)
            self._made[backend.name, None] = bitmap
        return bitmap


class PreparedWeight:
    """A weight [rows, columns] and its transpose, and every product of a layer with it."""

    def __init__(self, matrix: PreparedMatrix, make_transpose: Callable[[], PreparedMatrix]) -> None:
        self.matrix = matrix
        self._make_transpose = make_transpose

    @cached_property
    def transpose(self) -> PreparedMatrix:
        """The transpose, made when the first product needs it."""
        return self._make_transpose()

    @property
    def bytes(self) -> int:
        """Bytes of the plans and bitmaps of both."""
        return self.matrix.bytes + (self.transpose.bytes if "transpose" in vars(self) else 0)

    def forward(self, backend: Backend, method: str, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, rows] = x @ W.T + bias."""
        return self.matrix.spmm(backend, method, values, x, bias)

    def dx(self, backend: Backend, method: str, values: Tensor, dy: Tensor) -> Tensor:
        """dx [batch, columns] = dy @ W."""
        if method == "dense":
            return dy @ self.matrix.dense(backend, values)
        return self.transpose.spmm(backend, method, values, dy)

    def dvalues(self, backend: Backend, method: str, dy: Tensor, x: Tensor) -> Tensor:
        """dvalues [nnz] = the entries of dy.T @ x that are connections."""
        return self.matrix.sddmm(backend, method, dy, x)
