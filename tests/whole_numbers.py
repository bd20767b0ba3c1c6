"""Layers of whole numbers: whatever the order in which they are added, the sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath import pattern as patterns
from offpath.pattern import Pattern
from problems import small_integers


def whole_numbers(
    rows: int, columns: int, batch: int, sparsity: float, dtype: torch.dtype
) -> tuple[Pattern, Tensor, Tensor, Tensor, Tensor]:
    """A pattern, its values, x [batch, columns], dy [batch, rows] and a bias."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) >= sparsity
    pattern, draw = patterns.from_mask(mask), small_integers(rows + columns, dtype)
    return pattern, draw((pattern.nnz,)), draw((batch, columns)), draw((batch, rows)), draw((rows,))
