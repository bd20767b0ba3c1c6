"""The patterns and batches that every kernel test computes with, and the numbers that are drawn for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath import pattern as patterns
from offpath.pattern import Pattern

Draw = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Problem:
    """A pattern and a batch, named by the condition that it tests."""

    name: str
    make_pattern: Callable[[], Pattern]
    batch: int

    @property
    def pattern(self) -> Pattern:
        return self.make_pattern()


def _random(rows: int, columns: int, density: float) -> Callable[[], Pattern]:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    nnz = round(density * rows * columns)
    return lambda: patterns.random((rows, columns), nnz, generator)


def _only_row(rows: int, columns: int, row: int) -> Callable[[], Pattern]:
    def make() -> Pattern:
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        mask[row] = True
        return patterns.from_mask(mask)

    return make


def _one_long_row() -> Pattern:
    mask = patterns.random((64, 2048), 640, torch.Generator().manual_seed(5)).to_mask()
    mask[17] = True
    return patterns.from_mask(mask)


# Widths from 1 to twice the widest vector (16 lanes of float32), so that every tail of every ISA occurs.
WIDTHS = tuple(Problem(f"batch of {b}", _random(9, 23, 0.3), b) for b in range(1, 33))

PROBLEMS = (
    Problem("one connection", _random(1, 1, 1.0), 5),
    Problem("one row", _random(1, 40, 0.5), 9),
    Problem("one column", _random(40, 1, 0.5), 9),
    Problem("no connections", _random(6, 7, 0.0), 9),
    Problem("no rows", _random(0, 7, 0.0), 9),
    Problem("no columns", _random(7, 0, 0.0), 9),
    Problem("empty batch", _random(6, 7, 0.5), 0),
    Problem("every connection", _random(19, 21, 1.0), 20),
    Problem("only the first row", _only_row(8, 21, 0), 20),
    Problem("only the last row", _only_row(8, 21, 7), 20),
    Problem("rows of one to eight connections", lambda: patterns.from_mask(torch.ones(8, 8).tril().bool()), 17),
    Problem("strips of every width", _random(33, 65, 0.2), 8 * 16 + 4 * 16 + 2 * 16 + 16 + 3),
    Problem("several rows at once, and some that are left", _random(70, 1300, 0.3), 9),
    Problem("several threads", _random(200, 300, 0.1), 150),
    Problem("several threads, one long row", _one_long_row, 70),
    Problem("batch over several sddmm blocks", _random(12, 30, 0.2), 2048 * 2 + 5),
)

# Too large for gradcheck, which perturbs every entry of x.
LARGE_PROBLEMS = (
    Problem("several tiles, several blocks of rows", _random(1100, 150, 0.1), 150),
    Problem("tiles as wide as they get", _random(3, 66_000, 0.0005), 5),
    Problem("several strips of several rows", _random(70, 4200, 0.1), 9),
)


def small_integers(seed: int, dtype: torch.dtype) -> Draw:
    """Integers in [-3, 3] as floats: sums stay exact in every order, so results must agree to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randint(-3, 4, shape, generator=generator).to(dtype)


def freed(tensor: Tensor) -> Tensor:
    """A copy whose memory is gone, as sharded training leaves parameters between their uses."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def gaussian(seed: int, dtype: torch.dtype) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
