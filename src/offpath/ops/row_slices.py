"""Which entries of sparse rows those of some rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from offpath.kernels import KernelError
from offpath.kernels.reference_rows import check_pointer
from offpath.ops.int32 import expect_entries

RowChoice = slice | Tensor | np.ndarray | Sequence[int]


def entries_of(crow_indices: Tensor, nnz: int, chosen: RowChoice) -> tuple[Tensor, slice | Tensor]:
    """The row pointer of the `chosen` rows, and where their entries stand among `nnz`.

    A slice, row numbers [n] in any order, or a mask of all rows. Raises `KernelError` for others, and for chosen rows
    that lead elsewhere. No other row is looked at, or small batches of many rows would take long.
    """
    count, device = crow_indices.shape[0] - 1, crow_indices.device
    first, end, step = chosen.indices(count) if isinstance(chosen, slice) else (0, 0, 0)
    if step == 1:
        return _neighbours(crow_indices, nnz, first, max(first, end))
    if step:
        numbers = first + step * torch.arange(len(range(first, end, step)), device=device)
    else:
        numbers = _numbers(_as_tensor(chosen, count, device), count)
    starts, stops = crow_indices[numbers], crow_indices[numbers + 1]
    fits = (
        (crow_indices[0] == 0) & (crow_indices[-1] == nnz) & ((starts >= 0) & (starts <= stops) & (stops <= nnz)).all()
    )
    if not fits:  # before repetitions are counted: torch writes them before it looks at a negative one
        check_pointer(crow_indices, nnz)
    counts = stops - starts
    bounds = pad(counts.cumsum(0), (1, 0))
    total = expect_entries(int(bounds[-1]))
    shifts = starts - bounds[:-1]
    return bounds.int(), shifts.repeat_interleave(counts, output_size=total) + torch.arange(total, device=device)


def _neighbours(crow_indices: Tensor, nnz: int, first: int, end: int) -> tuple[Tensor, slice]:
    """Of the rows from `first` to `end`."""
    bounds = crow_indices[first : end + 1]
    start, stop = bounds[[0, -1]].tolist()
    begins = start == 0 if first == 0 else start >= 0
    ends = stop == nnz if end == crow_indices.shape[0] - 1 else stop <= nnz
    if not (begins and ends) or bool((bounds[1:] < bounds[:-1]).any()):
        check_pointer(crow_indices, nnz)  # says what is wrong
    return bounds - start, slice(start, stop)


def _as_tensor(chosen: Any, count: int, device: torch.device) -> Tensor:
    if isinstance(chosen, np.ndarray):
        chosen = np.ascontiguousarray(chosen)  # torch takes none that goes backwards
    if isinstance(chosen, Tensor | np.ndarray | list | range):
        try:
            return torch.as_tensor(chosen, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _refusal(count, f"{type(chosen).__name__} ({error})") from error
    raise _refusal(count, f"{type(chosen).__name__} {chosen!r:.60}")


def _numbers(rows: Tensor, count: int) -> Tensor:
    if rows.numel() == 0 and rows.dtype is not torch.bool:
        rows = rows.long()  # an empty list is one of floats to torch
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise _refusal(count, f"{rows.dtype} {tuple(rows.shape)}")
    if rows.dtype is torch.bool:
        if rows.shape[0] != count:
            raise _refusal(count, f"a mask of {rows.shape[0]}")
        return rows.nonzero()[:, 0]
    numbers = rows.long()
    if rows.numel() and not bool(((numbers >= -count) & (numbers < count)).all()):
        raise _refusal(count, f"numbers from {int(numbers.min())} to {int(numbers.max())}")
    return torch.where(numbers < 0, numbers + count, numbers)


def _refusal(count: int, got: str) -> KernelError:
    return KernelError(
        f"expected a slice, numbers of the {count} rows, or a mask [{count}], got {got}; one row is rows[i : i + 1]"
    )
