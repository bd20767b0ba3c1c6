"""What the native kernels make of a pattern that many products use: plans, tiles and bitmaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.errors import KernelError
from offpath.kernels.operands import DTYPES, refuse

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
    if dtype not in _MAKE_PLAN:
        raise KernelError(f"expected a plan for one of {', '.join(map(str, _MAKE_PLAN))}, got {dtype}")
    native = _MAKE_PLAN[dtype](isa, crow_indices, col_indices, columns, permutation, torch.get_num_threads())
    if native is None:
        refuse(crow_indices=crow_indices, col_indices=col_indices, permutation=permutation)
    return Prepared(native, crow_indices.numel() - 1, columns, col_indices.numel())


def make_bitmap(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    """One bit per position of a canonical pattern; O(nnz + rows x columns / 64)."""
    return _prepare(_native.make_bitmap, crow_indices, col_indices, columns)


def columns_of_bitmap(bitmap: Prepared) -> Tensor:
    """The col_indices that a bitmap was made of, int32 [nnz]."""
    with torch.inference_mode(False):  # or what keeps them could never be trained
        col_indices = torch.empty(bitmap.nnz, dtype=torch.int32, device="cpu")
    if not _native.write_columns(bitmap.native, col_indices, torch.get_num_threads()):
        refuse(col_indices=col_indices)
    return col_indices


def make_tiles(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    """A canonical pattern in the order in which its weight gradient is computed; O(nnz + rows + columns)."""
    return _prepare(_native.make_tiles, crow_indices, col_indices, columns)


def _prepare(make: Callable, crow_indices: Tensor, col_indices: Tensor, columns: int) -> Prepared:
    native = make(crow_indices, col_indices, columns, torch.get_num_threads())
    if native is None:
        refuse(crow_indices=crow_indices, col_indices=col_indices)
    return Prepared(native, crow_indices.numel() - 1, columns, col_indices.numel())
