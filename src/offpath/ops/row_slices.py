"""Which entries of sparse rows those of some rows are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from offpath.kernels import KernelError

Rows = slice | Tensor | Sequence[int]


def entries_of(crow_indices: Tensor, rows: Rows) -> tuple[Tensor, slice | Tensor]:
    """The row pointer of the chosen `rows`, and where their entries stand.

    A slice, row numbers [n] in any order, or a mask of all rows. Raises `KernelError` for others.
    """
    count = crow_indices.shape[0] - 1
    if isinstance(rows, slice):
        first, end, step = rows.indices(count)
        if step == 1:
            bounds = crow_indices[first : max(first, end) + 1]
            start, stop = bounds[[0, -1]].tolist()
            return bounds - start, slice(start, stop)
        rows = range(first, end, step)
    numbers = _numbers(torch.as_tensor(rows, device=crow_indices.device), count)
    counts = crow_indices.diff()[numbers]
    bounds = pad(counts.cumsum(0), (1, 0))
    total = expect_int32(int(bounds[-1]))
    shifts = crow_indices[numbers].long() - bounds[:-1]
    return bounds.int(), shifts.repeat_interleave(counts, output_size=total) + torch.arange(total, device=bounds.device)


def expect_int32(entries: int) -> int:
    """So many entries. Raises `KernelError` for more than int32 can count."""
    if entries >= 2**31:
        raise KernelError(f"expected at most 2^31 - 1 entries, got {entries}; take fewer rows at a time")
    return entries


def _numbers(rows: Tensor, count: int) -> Tensor:
    if rows.numel() == 0 and rows.dtype is not torch.bool:
        rows = rows.long()  # an empty list is one of floats to torch
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise KernelError(
            f"expected a slice, row numbers [n] or a mask [{count}], got {rows.dtype} {tuple(rows.shape)}; one row is "
            "rows[i : i + 1]"
        )
    if rows.dtype is torch.bool:
        if rows.shape[0] != count:
            raise KernelError(f"expected a mask of {count} rows, got one of {rows.shape[0]}")
        return rows.nonzero()[:, 0]
    numbers = rows.long()
    if rows.numel() and not bool(((numbers >= -count) & (numbers < count)).all()):
        raise KernelError(
            f"expected row numbers from {-count} to {count - 1}, got {int(numbers.min())} to {int(numbers.max())}"
        )
    return torch.where(numbers < 0, numbers + count, numbers)
