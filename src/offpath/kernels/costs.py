"""Seconds that each method takes, measured on a grid of sizes, densities and batches and interpolated between."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product as combinations

# Grid points: square matrices of this many rows, shares of positions that are connections, tokens. There are two tables
# of three sizes each: larger matrices take longer to measure, and only who has such layers has to wait for them. What
# fits into the caches at 1024 does not at 4096, so that one tells little of the other: what goes over a plan took two
# thirds of the time at 2048 that was predicted without the size between.
Sizes = tuple[int, int, int]
SMALL_SIZES: Sizes = (128, 512, 1024)
LARGE_SIZES: Sizes = (1024, 2048, 4096)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0)
BATCHES = (1, 4, 16, 32, 64, 256, 2048)
# Tokens stand side by side in registers where these products are computed: beyond the first register, which the grid
# tells of, each further one (or half of one) that is begun takes as long as if it were full.
FIRST_REGISTER, TOKENS_AT_ONCE = 16, {"bucketed": 16, "row-wise": 16, "tiled": 16, "filled": 8}
GRID = tuple(combinations(range(len(SMALL_SIZES)), range(len(DENSITIES)), range(len(BATCHES))))


def sizes_for(rows: int, columns: int) -> Sizes:
    """The sizes of the table that tells of a matrix."""
    return SMALL_SIZES if rows * columns <= SMALL_SIZES[-1] ** 2 else LARGE_SIZES


def beyond(edge: tuple[int, int], seconds: tuple[float, float], n: int) -> float:
    """Seconds of n, more than the second of the two sizes at the grid's edge, which take `seconds`.

    What a call costs besides its work does not grow, but is at most half of it at the edge.

    >>> beyond((64, 256), (2.0, 5.0), 512)
    9.0
    """
    (fewer, most), (of_fewer, of_most) = edge, seconds
    return of_most + max((of_most - of_fewer) / (most - fewer), of_most / most / 2) * (n - most)


@dataclass(frozen=True)
class CostTable:
    """`seconds[product][method]` holds one entry per point of GRID, in its order."""

    sizes: Sizes
    seconds: dict[str, dict[str, list[float]]]

    @classmethod
    def from_measurement(cls, sizes: Sizes, seconds: dict[str, dict[str, list[float]]]) -> CostTable:
        """The table of what was measured, where no point takes longer than a larger one.

        Whatever disturbs a measurement makes it longer, never shorter; so a larger problem that took less time shows
        that a smaller one was disturbed. One such point left in would make a slow method look cheap beside it for good.
        """
        smooth = {p: {m: without_bumps(column) for m, column in methods.items()} for p, methods in seconds.items()}
        return cls(sizes, smooth)

    def predict(self, product: str, method: str, rows: int, columns: int, nnz: int, batch: int) -> float:
        """Seconds of one call.

        Multilinear in the logarithms of positions, density and batch, which is rounded up to where registers are full
        of tokens (the weight gradient of "filled" has columns there); in the many tokens of the last step, linear.
        Beyond the grid, time grows with positions and
        tokens as it does towards its edge (see `beyond`). It does not shrink below the grid's edge.

        >>> a_microsecond_a_token = [batch * 1e-6 for _, _, batch in combinations(SMALL_SIZES, DENSITIES, BATCHES)]
        >>> table = CostTable(SMALL_SIZES, {"forward": {"dense": a_microsecond_a_token}})
        >>> round(table.predict("forward", "dense", 128, 128, 1000, 64) * 1e6)
        64
        """
        positions = max(rows * columns, 1)
        measured, density = self.seconds[product][method], nnz / positions
        if batch > FIRST_REGISTER and (product, method) != ("dvalues", "filled"):
            at_once = TOKENS_AT_ONCE.get(method, 1)
            batch = math.ceil(batch / at_once) * at_once
        fewer, most = BATCHES[-2:]
        if batch <= fewer:
            return self._for_any_positions(measured, positions, density, batch)
        of_fewer = self._for_any_positions(measured, positions, density, fewer)
        of_most = self._for_any_positions(measured, positions, density, most)
        if batch > most:
            return beyond((fewer, most), (of_fewer, of_most), batch)
        return of_fewer + (of_most - of_fewer) * (batch - fewer) / (most - fewer)

    def _for_any_positions(self, measured: list[float], positions: int, density: float, batch: int) -> float:
        seconds = self._interpolate(measured, math.sqrt(positions), density, batch)
        if positions > self.sizes[-1] ** 2:
            smaller = self._interpolate(measured, self.sizes[-2], density, batch)
            seconds = beyond((self.sizes[-2] ** 2, self.sizes[-1] ** 2), (smaller, seconds), positions)
        return seconds

    def _interpolate(self, measured: list[float], size: float, density: float, batch: int) -> float:
        axes = _place(size, self.sizes), _place(density, DENSITIES), _place(batch, BATCHES)
        logarithm = 0.0
        for corner in combinations((0, 1), repeat=3):
            share = math.prod(part if side else 1 - part for side, (_, part) in zip(corner, axes, strict=True))
            if share:
                s, d, b = (low + side for side, (low, _) in zip(corner, axes, strict=True))
                logarithm += share * math.log(measured[(s * len(DENSITIES) + d) * len(BATCHES) + b])
        return math.exp(logarithm)


def without_bumps(column: list[float]) -> list[float]:
    """One entry per point of GRID, none larger than that of a larger problem; what is infinite was not measured."""
    smoothed = dict(zip(GRID, column, strict=True))
    for size, density, batch in reversed(GRID):
        larger = ((size + 1, density, batch), (size, density + 1, batch), (size, density, batch + 1))
        seconds = smoothed[size, density, batch]
        if not math.isinf(seconds):
            smoothed[size, density, batch] = min((seconds, *(smoothed[p] for p in larger if p in smoothed)))
    return list(smoothed.values())


def _place(value: float, grid: tuple[float, ...]) -> tuple[int, float]:
    """The grid point at or below `value` and how far, in logarithms, it is on the way to the next one."""
    value = min(max(value, grid[0]), grid[-1])
    low = min(bisect_right(grid, value), len(grid) - 1) - 1
    return low, math.log(value / grid[low]) / math.log(grid[low + 1] / grid[low])
