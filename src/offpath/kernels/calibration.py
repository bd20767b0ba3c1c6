"""Measures what each method costs on this machine: once, in seconds, on first need (see measured.py)."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpath.kernels.backend import Backend
from offpath.kernels.costs import BATCHES, DENSITIES, GRID, LARGE_SIZES, CostTable, Sizes, beyond, without_bumps
from offpath.kernels.measured import measured_once
from offpath.kernels.methods import METHODS, PreparedMatrix, PreparedWeight
from offpath.kernels.undisturbed import fastest

_log = logging.getLogger("offpath")
Seconds = dict[str, list[float]]
Key = tuple[str, str, int]  # product, method, place in GRID
Call = Callable[[], object]
Times = dict[Key, float]
SMALL_ROUNDS, LARGE_ROUNDS = 5, 3
# Not every point of the grid is measured. Dense and filled take as long at all densities, but for the writing out, and
# for what filled reads of a large matrix's values, which is why it is measured at two. Over bits, the values are read
# once for every eight tokens, for dX every sixteen, and dvalues takes as long as at full density; the row-wise form
# reads its x once for every connection: they are out of the question long before many tokens or connections. Nearly
# dense large matrices would take more time and memory than all others together: what grows with the connections grows
# as it does up to there. Beyond 256 tokens, time grows with them; except for dense and filled products of small
# matrices: torch's of 256 x 256 on AMX takes 4 times as long for 16 times as many.
AT_ANY_DENSITY, DENSE_DENSITY = ("dense", "filled"), DENSITIES.index(0.5)
BITMAP_MEASURED_BATCHES = {"forward": 16, "dx": 16, "dvalues": 64}
LAST_ROW_WISE = DENSITIES.index(0.2), BATCHES.index(32)
LAST_LARGE_DENSITY = DENSITIES.index(0.5)
MANY, LARGEST_WITH_MANY = len(BATCHES) - 1, 512
# Densities that are measured together. Of the large sizes, half of all connections are in the second half, and with
# both in memory at once a process would take more than a gigabyte.
TOGETHER = range(len(DENSITIES))
HALVES = TOGETHER[:DENSE_DENSITY], TOGETHER[DENSE_DENSITY:]
# What takes as long at all densities is measured in either half, at the densities next to one another, and tells
# whether the processor ran at one speed: with many tokens, where memory has no part in it.
SPEED_DENSITY, SPEED_BATCH = DENSE_DENSITY - 1, BATCHES.index(64)
LEAST_DRIFT = 1.1


@cache
def cost_table(backend: Backend, dtype: torch.dtype, sizes: Sizes) -> CostTable:
    """What the methods of `backend` cost for `dtype` (float64 follows float32): from the cache, or measured now."""
    dtype = torch.float32 if dtype is torch.float64 else dtype
    facts: list[object] = [METHODS, sizes, DENSITIES, BATCHES]
    seconds = measured_once(
        "costs", backend.name, dtype, facts, _is_complete, lambda: measure(backend, dtype, sizes).seconds
    )
    return CostTable(sizes, seconds)


def measure(backend: Backend, dtype: torch.dtype, sizes: Sizes) -> CostTable:
    """Time every method on the grid, on the threads that torch uses now; takes a few seconds.

    What is measured together is gone through several times and the best time kept (see `fastest`).
    """
    _log.log(
        logging.WARNING if sizes == LARGE_SIZES else logging.INFO,
        "offpath measures once what its %s products of up to %d x %d cost here; this takes seconds",
        dtype,
        sizes[-1],
        sizes[-1],
    )
    best = {p: {m: [math.inf] * len(GRID) for m in methods} for p, methods in METHODS.items()}
    parts = HALVES if sizes == LARGE_SIZES else (TOGETHER,)
    found = [_measure_densities(backend, dtype, sizes, densities) for densities in parts]
    for times in at_one_speed(*found) if len(found) > 1 else found:
        for (product, method, i), seconds in times.items():
            best[product][method][i] = seconds
    for product, methods in best.items():
        _fill_in(product, methods)
    return CostTable.from_measurement(sizes, best)


def at_one_speed(first: Times, second: Times) -> tuple[Times, Times]:
    """The times of both halves as if the processor had run at the faster one's speed all the time.

    On its own it runs faster while it is cool, and a virtual one slower while its neighbours work, for seconds at a
    time: one method's time in one half cannot be compared with another's in the other half then.
    """
    slower = statistics.median(
        seconds / second[product, method, i + len(BATCHES)]
        for (product, method, i), seconds in first.items()
        if method in AT_ANY_DENSITY and GRID[i][2] >= SPEED_BATCH
    )
    if slower > LEAST_DRIFT:
        return {key: seconds / slower for key, seconds in first.items()}, second
    if slower < 1 / LEAST_DRIFT:
        return first, {key: seconds * slower for key, seconds in second.items()}
    return first, second


def _measure_densities(backend: Backend, dtype: torch.dtype, sizes: Sizes, densities: range) -> Times:
    calls: dict[Key, Call] = {
        (product, method, i): partial(_run, weight, backend, product, method, values, x)
        for i, (weight, values), x in _problems(sizes, densities, dtype)
        for product, methods in METHODS.items()
        for method in methods
        if _is_measured(sizes, product, method, *GRID[i])
    }
    before: dict[Key, Call] = {}
    rounds = SMALL_ROUNDS
    if sizes == LARGE_SIZES:
        # Matrix after matrix, as the layers of a network: a product that still finds its own in cache may take half as
        # long. Small ones find theirs there in a network as well.
        calls = {key: calls[key] for key in sorted(calls, key=lambda key: (GRID[key[2]][2], *key[:2]))}
        before, rounds = _small_ones_before(calls), LARGE_ROUNDS
    with torch.inference_mode():
        return fastest(calls, rounds, before)


def _small_ones_before(calls: Mapping[Key, Call]) -> dict[Key, Call]:
    """For the first call of each method and number of tokens, one with another matrix, a small one.

    The call before it has left a much larger matrix in the caches. What comes next may take four times as long, however
    small: at the density of dense and filled, which are measured at no other.
    """
    before: dict[Key, Call] = {}
    for (product, _, batch), turn in groupby(calls, key=lambda key: (*key[:2], GRID[key[2]][2])):
        first = next(turn)
        small = ((product, METHODS[product][0], GRID.index((0, density, batch))) for density in TOGETHER)
        before[first] = next(calls[key] for key in small if key in calls and key[2] != first[2])
    return before


def _is_measured(sizes: Sizes, product: str, method: str, size: int, density: int, batch: int) -> bool:
    if batch == MANY and (method not in AT_ANY_DENSITY or sizes[size] > LARGEST_WITH_MANY):
        return False
    if method in AT_ANY_DENSITY:
        at_second = sizes == LARGE_SIZES and density == SPEED_DENSITY and (method == "filled" or batch >= SPEED_BATCH)
        return density == DENSE_DENSITY or at_second
    if method == "bitmap":
        return BATCHES[batch] <= BITMAP_MEASURED_BATCHES[product]
    return method != "row-wise" or density <= LAST_ROW_WISE[0] or batch <= LAST_ROW_WISE[1]


def _fill_in(product: str, methods: Seconds) -> None:
    """Scale what was measured to the points of the grid that were not.

    Without the bumps: if one stood where a growth begins, all further points would be too short, and a slow method
    would look cheap.
    """
    for method, seconds in methods.items():
        at = dict(zip(GRID, without_bumps(seconds), strict=True))
        for size, density, batch in GRID:
            if batch == MANY or not math.isinf(at[size, density, batch]):
                continue
            if method in AT_ANY_DENSITY:
                second = at[size, SPEED_DENSITY, batch] if density < SPEED_DENSITY else math.inf
                at[size, density, batch] = at[size, DENSE_DENSITY, batch] if math.isinf(second) else second
            elif method == "bitmap" and BATCHES[batch] > BITMAP_MEASURED_BATCHES[product]:
                at[size, density, batch] = at[size, density, batch - 1] * BATCHES[batch] / BATCHES[batch - 1]
            else:
                of_fewer, of_more = at[size, density - 2, batch], at[size, density - 1, batch]
                fewer, more = DENSITIES[density - 2 : density]
                at[size, density, batch] = of_more + (of_more - of_fewer) * (DENSITIES[density] - more) / (more - fewer)
        for size, density, _ in (point for point in GRID if point[2] == MANY):
            known = at[size, DENSE_DENSITY, MANY]
            edge = at[size, density, MANY - 2], at[size, density, MANY - 1]
            if method in AT_ANY_DENSITY and not math.isinf(known):
                at[size, density, MANY] = known
            else:
                at[size, density, MANY] = beyond((BATCHES[MANY - 2], BATCHES[MANY - 1]), edge, BATCHES[MANY])
        methods[method] = [at[point] for point in GRID]


def _problems(
    sizes: Sizes, densities: range, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[PreparedWeight, Tensor], Tensor]]:
    """Grid points, each with a weight, its values and tokens."""
    generator = torch.Generator().manual_seed(0)
    for i, (size, density, batch) in enumerate(GRID):
        if density not in densities or (sizes[size] in LARGE_SIZES[1:] and density > LAST_LARGE_DENSITY):
            continue
        point = size, density, batch
        if not any(_is_measured(sizes, p, method, *point) for p, methods in METHODS.items() for method in methods):
            continue
        if batch == 0:
            weight = _random_weight(sizes[size], DENSITIES[density], dtype, generator)
        yield i, weight, torch.randn(BATCHES[batch], sizes[size], generator=generator).to(dtype)


def _random_weight(
    size: int, density: float, dtype: torch.dtype, generator: torch.Generator
) -> tuple[PreparedWeight, Tensor]:
    # NumPy selects by a mask without the two 64-bit copies of it that torch makes.
    mask = (torch.rand(size, size, generator=generator) < density).numpy()
    columns = np.broadcast_to(np.arange(size, dtype=np.int32), (size, size))

    def matrix(mask: np.ndarray, permutation: Tensor | None) -> PreparedMatrix:
        crow_indices = torch.zeros(size + 1, dtype=torch.int32)
        crow_indices[1:] = torch.from_numpy(mask.sum(1).cumsum())
        return PreparedMatrix(crow_indices, torch.from_numpy(columns[mask]), size, permutation)

    slots = mask.cumsum(dtype=np.int32).reshape(size, size)
    transpose = matrix(mask.T, torch.from_numpy(slots.T[mask.T] - 1))
    weight = PreparedWeight(matrix(mask, None), lambda: transpose)
    return weight, torch.randn(int(mask.sum()), generator=generator).to(dtype)


def _run(weight: PreparedWeight, backend: Backend, product: str, method: str, values: Tensor, x: Tensor) -> Tensor:
    if product == "forward":
        return weight.forward(backend, method, values, x, None)
    if product == "dx":
        return weight.dx(backend, method, values, x)
    return weight.dvalues(backend, method, x, x)


def _is_complete(seconds: Any) -> bool:
    return isinstance(seconds, dict) and all(
        isinstance(column := seconds.get(product, {}).get(method), list)
        and len(column) == len(GRID)
        and all(isinstance(s, float) and s > 0 for s in column)
        for product, methods in METHODS.items()
        for method in methods
    )
