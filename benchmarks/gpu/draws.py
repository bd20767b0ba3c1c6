"""Random operands of the checks and the timings: patterns, sparse rows, numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers(*shape: int, dtype: torch.dtype, device: torch.device | str, whole: bool = False) -> Tensor:
    """Normal, or whole numbers from -2 to 2: their sums have no rounding, and so no excuse."""
    if whole:
        return torch.randint(-2, 3, shape, device=device).to(dtype)
    return torch.randn(*shape, device=device).to(dtype)


def ragged_rows(rows: int, columns: int, most: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(crow_indices, indices) of rows with up to `most` entries in any order, some more than once, some rows empty."""
    counts = torch.randint(0, most + 1, (rows,), device=device)
    counts[0] = most
    if rows > 1:
        counts[-1] = 0
    return starts(counts), torch.randint(0, columns, (int(counts.sum()),), device=device, dtype=torch.int32)


def topk_rows(rows: int, columns: int, k: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(crow_indices, indices) of rows with k different entries each, ascending, as top-k writes them.

    One from each of k stretches of the columns, all as likely: a draw without a sort of all columns for each row.
    """
    first = torch.arange(k, device=device) * columns // k
    widths = (torch.arange(1, k + 1, device=device) * columns // k) - first
    inside = (torch.rand(rows, k, device=device) * widths).long().clamp(max=widths - 1)
    crow_indices = torch.arange(0, rows * k + 1, k, device=device, dtype=torch.int32)
    return crow_indices, (first + inside).int().view(-1)


def pattern(rows: int, columns: int, density: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Canonical (crow_indices, col_indices) with each position live by chance; exact at densities of 0 and 1."""
    live = torch.rand(rows, columns, device=device) < density
    return starts(live.sum(1)), live.nonzero()[:, 1].int()


def starts(counts: Tensor) -> Tensor:
    """The crow_indices of rows with so many entries."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def transposed(crow_indices: Tensor, col_indices: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, col_indices, permutation) of the transpose: its slot s has the value `values[permutation[s]]`."""
    counts = crow_indices.diff()
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    permutation = col_indices.argsort(stable=True)
    return starts(torch.bincount(col_indices, minlength=columns)), rows[permutation].int(), permutation


def dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """The matrix, written out."""
    counts = crow_indices.diff()
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    result = values.new_zeros(counts.numel(), columns)
    result[rows, col_indices.long()] = values
    return result
