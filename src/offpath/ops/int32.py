"""What indices of int32 can name and count."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from offpath.kernels import KernelError
from offpath.ops.library import is_tracing


def expect_entries(entries: int) -> int:
    """So many entries. Raises `KernelError` for more than int32 can count."""
    if entries >= 2**31:
        raise KernelError(f"expected at most 2^31 - 1 entries, got {entries}; split the batch")
    return entries


def expect_columns(columns: Any) -> Any:
    """So many columns, as an int; the number of a compiler or tracer as it is. Raises `KernelError` for others."""
    if isinstance(columns, torch.SymInt) or (isinstance(columns, Tensor) and is_tracing()):
        return columns
    if not isinstance(columns, int):
        with suppress(TypeError):
            columns = operator.index(columns)  # a whole number of another library
    if not isinstance(columns, int) or not 0 <= columns < 2**31:
        raise KernelError(f"expected columns to be an int that int32 indices can count, got {columns!r:.60}")
    return columns


def of_int32(indices: Tensor, columns: int) -> Tensor:
    """What no int32 can hold must not become another index; products refuse -1 and `columns`."""
    return (indices.clamp(-1, columns) if indices.dtype is torch.int64 else indices).int()
