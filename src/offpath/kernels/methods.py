"""The ways to compute each product of a prepared matrix: by name, so that they can be compared, chosen and forced."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.kernels.backend import Backend
from offpath.kernels.operands import in_own_dtype, made_once

# Products of a layer: y = x W^T, the gradient of x, the gradient of the values.
PRODUCTS = ("forward", "dx", "dvalues")
# bucketed, tiled: over a plan, for many tokens. row-wise: straight over the indices. bitmap: for a few tokens, over one
# bit per position. filled: over the same bits, for many tokens where little is missing: tiles of the weight are written
# out in cache. dense: write the whole weight out, and leave the rest to torch. In the last two, absent connections are
# zeros, so an infinite input becomes NaN as in `nn.Linear`.
METHODS = {
    "forward": ("bucketed", "row-wise", "bitmap", "filled", "dense"),
    "dx": ("bucketed", "row-wise", "bitmap", "filled", "dense"),
    "dvalues": ("tiled", "row-wise", "bitmap", "filled", "dense"),
}
# Those that multiply int8 values as they are; the others, a copy of them in the dtype of the activations.
INT8_METHODS = ("bucketed", "bitmap", "filled")
# Those whose memory is not O(nnz + rows x columns / 64).
DENSE_METHODS = ("dense",)
# What computes dvalues in one call with dx: the method of dx, those of dvalues.
AT_ONCE = {"bucketed": ("tiled", "filled"), "filled": ("tiled", "filled", "bitmap"), "bitmap": ("filled", "bitmap")}


_keeping = Lock()


class PreparedMatrix:
    """A canonical CSR matrix and what backends made of it; its tensors must never change.

    With a `permutation`, slot s has the value `values[permutation[s]]`.
    """

    def __init__(
        self, crow_indices: Tensor, col_indices: Tensor, columns: int, permutation: Tensor | None = None
    ) -> None:
        self.crow_indices = crow_indices
        self.rows, self.columns, self.nnz = crow_indices.shape[0] - 1, columns, col_indices.shape[0]
        self.permutation = permutation
        self._made: dict[tuple[str, Hashable], Any] = {}
        self.kept_columns: Tensor | None = col_indices
        self._columns_of_bits: Callable[[], Tensor] | None = None

    @property
    def col_indices(self) -> Tensor:
        """The column of each entry. Who asks for them after they have been let go has them kept for good."""
        kept = self.kept_columns
        if kept is None:
            with _keeping:  # or two threads would each keep their own
                kept = self.kept_columns = self.find_columns()
        return kept

    def find_columns(self) -> Tensor:
        """The same, kept or not."""
        kept = self.kept_columns
        if kept is not None:
            return kept
        assert self._columns_of_bits is not None
        return self._columns_of_bits()

    def can_let_columns_go(self, backend: Backend) -> bool:
        """Whether there are bits to find them in. Once, or products in turns would find and forget them for ever."""
        has_bits = backend.columns_of_bitmap is not None and (backend.name, "bitmap") in self._made
        return has_bits and self._columns_of_bits is None

    def let_columns_go(self, backend: Backend) -> None:
        """Keep the bits alone, which there must be."""
        assert backend.columns_of_bitmap is not None
        self._columns_of_bits = partial(backend.columns_of_bitmap, self._made[backend.name, "bitmap"])
        self.kept_columns = None

    def spmm(
        self,
        backend: Backend,
        method: str,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None = None,
        feature_major: bool = False,
        dense: Tensor | None = None,
    ) -> Tensor:
        """x @ W.T + bias for x [batch, columns], by one of METHODS; a native backend takes x [..., columns].

        `dense` is the weight, where it is written out already. With `feature_major`, a method that can save a transpose
        by it returns a view of a contiguous [rows, batch].
        """
        if method == "bucketed":
            return backend.planned_spmm(self.plan(backend, values.dtype), values, x, bias, feature_major=feature_major)
        if self.permutation is not None:
            values = values.index_select(0, self.permutation)
        if method == "row-wise":
            return backend.spmm(self.crow_indices, self.col_indices, values, x, bias)
        if method == "bitmap":
            return backend.bitmap_spmm(self.bitmap(backend), values, x, bias)
        if method == "filled":
            return backend.filled_spmm(self.bitmap(backend), values, x, bias, feature_major=feature_major)
        weight = self.dense(backend, values) if dense is None else dense
        with in_own_dtype(x):
            return linear(x, weight, bias)

    def int8_spmm(
        self, backend: Backend, method: str, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The same with int8 values and a scale for each row, of a matrix without a permutation; see INT8_METHODS."""
        if method == "bitmap":
            return backend.bitmap_int8_spmm(self.bitmap(backend), values, scales, x, bias)
        if method == "bucketed":
            return backend.planned_int8_spmm(self.plan(backend, x.dtype), values, scales, x, bias)
        if method == "filled":
            return backend.filled_int8_spmm(self.bitmap(backend), values, scales, x, bias)
        sums = self.spmm(backend, method, values.to(x.dtype), x)
        return sums.mul_(scales) if bias is None else sums.mul_(scales).add_(bias)

    def sddmm(self, backend: Backend, method: str, dy: Tensor, x: Tensor) -> Tensor:
        """The gradient of the values for dy [batch, rows] and x [batch, columns], by one of METHODS."""
        if method == "dense":
            with in_own_dtype(x):
                gradient = dy.t() @ x
            return backend.compress(self.bitmap(backend), gradient)
        if method == "bitmap":
            return backend.bitmap_dvalues(self.bitmap(backend), dy, x)
        if method == "filled":
            return backend.filled_dvalues(self.bitmap(backend), dy, x)
        if method == "tiled":
            return backend.tiled_sddmm(self.tiles(backend), dy, x)
        return backend.sddmm(self.crow_indices, self.col_indices, dy, x)

    def dense(self, backend: Backend, values: Tensor) -> Tensor:
        """The matrix [rows, columns] written out."""
        return backend.expand(self.bitmap(backend), values)

    def plan(self, backend: Backend, dtype: torch.dtype) -> Any:
        """What `planned_spmm` wants."""
        return self._once(backend, ("plan", dtype), backend.plan, dtype=dtype, permutation=self.permutation)

    def tiles(self, backend: Backend) -> Any:
        """What `tiled_sddmm` wants."""
        return self._once(backend, "tiles", backend.tiles)

    def bitmap(self, backend: Backend) -> Any:
        """What `bitmap_spmm` and its gradients want."""
        return self._once(backend, "bitmap", backend.bitmap)

    @property
    def bytes(self) -> int:
        """Bytes of the indices, plans, tiles and bitmaps."""
        kept = self.crow_indices, self.kept_columns, self.permutation
        indices = sum(one.numel() * one.element_size() for one in kept if one is not None)
        return indices + sum(made.bytes for made in list(self._made.values()))  # a list: other threads may make some

    def _once(self, backend: Backend, kind: Hashable, make: Callable[..., Any], **options: Any) -> Any:
        made = self._made.get((backend.name, kind))
        if made is None:
            indices = self.crow_indices, self.find_columns()
            made = made_once(lambda: make(*indices, self.columns, **options), self.crow_indices)
            self._made[backend.name, kind] = made
        return made


class PreparedWeight:
    """A weight [rows, columns] and its transpose, and every product of a layer with it."""

    def __init__(self, matrix: PreparedMatrix, make_transpose: Callable[[], PreparedMatrix]) -> None:
        self.matrix = matrix
        self._make_transpose = make_transpose

    @cached_property
    def transpose(self) -> PreparedMatrix:
        """The transpose, made when the first product needs it."""
        return made_once(self._make_transpose, self.matrix.crow_indices)

    @property
    def bytes(self) -> int:
        """Bytes of the indices, plans, tiles and bitmaps of both."""
        return self.matrix.bytes + (self.transpose.bytes if "transpose" in vars(self) else 0)

    def forward(
        self,
        backend: Backend,
        method: str,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        feature_major: bool = False,
        dense: Tensor | None = None,
    ) -> Tensor:
        """y [batch, rows] = x @ W.T + bias."""
        return self.matrix.spmm(backend, method, values, x, bias, feature_major, dense)

    def dx(self, backend: Backend, method: str, values: Tensor, dy: Tensor, dense: Tensor | None = None) -> Tensor:
        """dx [batch, columns] = dy @ W."""
        if method == "dense":
            weight = self.matrix.dense(backend, values) if dense is None else dense
            with in_own_dtype(dy):
                return dy @ weight
        if method == "bitmap":
            return backend.bitmap_dx(self.matrix.bitmap(backend), values, dy)
        if method == "filled":
            return backend.filled_dx(self.matrix.bitmap(backend), values, dy)
        return self.transpose.spmm(backend, method, values, dy)

    def backward(
        self,
        backend: Backend,
        dx_method: str,
        dvalues_method: str,
        values: Tensor,
        dy: Tensor,
        x: Tensor,
        feature_major: bool = False,
        dense: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dvalues, dbias): in one go where a backend has that."""
        at_once = dvalues_method in AT_ONCE.get(dx_method, ())
        if at_once and "bitmap" in (dx_method, dvalues_method):
            fills = {"fills_dx": dx_method == "filled", "fills_dvalues": dvalues_method == "filled"}
            return backend.bitmap_backward(self.matrix.bitmap(backend), values, dy, x, **fills)
        if at_once:
            transpose = self.transpose.plan(backend, values.dtype) if dx_method == "bucketed" else None
            tiles = self.matrix.tiles(backend) if dvalues_method == "tiled" else None
            bitmap = self.matrix.bitmap(backend) if "filled" in (dx_method, dvalues_method) else None
            return backend.backward(transpose, tiles, bitmap, values, dy, x, feature_major=feature_major)
        dbias = dy.sum(0)
        if backend.lay_by_feature is not None and dx_method == dvalues_method == "row-wise":
            dy = backend.lay_by_feature(dy)
        return self.dx(backend, dx_method, values, dy, dense), self.dvalues(backend, dvalues_method, dy, x), dbias

    def dvalues(self, backend: Backend, method: str, dy: Tensor, x: Tensor) -> Tensor:
        """dvalues [nnz] = the entries of dy.T @ x that are connections."""
        return self.matrix.sddmm(backend, method, dy, x)
