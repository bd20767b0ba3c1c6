"""What the native kernels make of a pattern that many products use: plans, tiles and bitmaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.operands import DTYPES, address, are_indices, refuse

_SUFFIXES = dict(zip(DTYPES, ("f32", "f64", "bf16"), strict=True))


def native_of_each_dtype(name: str) -> dict[torch.dtype, Callable[..., Any]]:
    return {dtype: getattr(_native, f"{name}_{suffix}") for dtype, suffix in _SUFFIXES.items()}


_MAKE_PLAN = native_of_each_dtype("make_plan")


@dataclass(frozen=True)
class Prepared:
    """A pattern in the order in which one product goes through it; holds its own copy."""

    native: Any
    rows: int
    columns: int
    nnz: int

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return self.native.bytes


def make_plan(
    isa: int,
    crow_indices: Tensor,
    col_indices: Tensor,
    columns: int,
    dtype: torch.dtype,
    permutation: Tensor | None = None,
) -> Prepared:
    """What `Variant.planned_spmm` of the variant `isa` wants for a canonical pattern; O(nnz + rows)."""
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    if not (
        are_indices(crow_indices, col_indices)
        and (permutation is None or (are_indices(crow_indices, permutation) and permutation.shape[0] == nnz))
    ):
        refuse(crow_indices=crow_indices, col_indices=col_indices, permutation=permutation)
    native = _MAKE_PLAN[dtype](
        isa,
        rows,
        columns,
        address(crow_indices),
        address(col_indices),
        0 if permutation is None else address(permutation),
        torch.get_num_threads(),
    )
    return Prepared(native, rows, columns, nnz)


def make_bitmap(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    """One bit per position of a canonical pattern; O(nnz + rows x columns / 64)."""
    return _prepare(_native.make_bitmap, crow_indices, col_indices, columns)


def make_tiles(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    """A canonical pattern in the order in which its weight gradient is computed; O(nnz + rows + columns)."""
    return _prepare(_native.make_tiles, crow_indices, col_indices, columns)


def _prepare(make: Callable, crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    if not are_indices(crow_indices, col_indices):
        refuse(crow_indices=crow_indices, col_indices=col_indices)
    native = make(rows, columns, address(crow_indices), address(col_indices), torch.get_num_threads())
    return Prepared(native, rows, columns, nnz)
