"""Measures what each method costs on this machine: once, in seconds, on first need (see measured.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offpath.kernels.backend import Backend
from offpath.kernels.costs import BATCHES, DENSITIES, GRID, LARGE_SIZES, CostTable
from offpath.kernels.measured import measured_once
from offpath.kernels.methods import METHODS, PreparedMatrix, PreparedWeight
from offpath.kernels.undisturbed import fastest

_log = logging.getLogger("offpath")
Sizes = tuple[int, int]
Seconds = dict[str, list[float]]
SMALL_ROUNDS, LARGE_ROUNDS = 5, 3
# Not every point of the grid is measured. Dense and filled take as long at all densities, but for the writing out. A
# bitmap reads its values once for every eight tokens, and the row-wise form its x once for every connection, so that
# they are out of the question long before many tokens or connections. Nearly dense matrices of the largest size would
# take more time and memory than all others together.
AT_ANY_DENSITY, DENSE_DENSITY = ("dense", "filled"), DENSITIES.index(0.5)
LAST_BITMAP_BATCH = BATCHES.index(16)
LAST_ROW_WISE = DENSITIES.index(0.2), BATCHES.index(16)
LAST_LARGE_DENSITY = DENSITIES.index(0.5)
# Densities that are measured together: half of all connections are in the second half, and with both in memory at once
# a process would take more than a gigabyte.
HALVES = (range(DENSITIES.index(0.5)), range(DENSITIES.index(0.5), len(DENSITIES)))


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

    Each half of the grid is gone through several times and the best time kept (see `fastest`).
    """
    _log.log(
        logging.WARNING if sizes == LARGE_SIZES else logging.INFO,
        "offpath measures once what its %s products of up to %d x %d cost here; this takes seconds",
        dtype,
        sizes[1],
        sizes[1],
    )
    best = {p: {m: [math.inf] * len(GRID) for m in methods} for p, methods in METHODS.items()}
    for densities in HALVES:
        _measure_densities(backend, dtype, sizes, densities, best)
    for methods in best.values():
        _fill_in(methods)
    return CostTable.from_measurement(sizes, best)


def _measure_densities(
    backend: Backend, dtype: torch.dtype, sizes: Sizes, densities: range, best: dict[str, Seconds]
) -> None:
    calls = {
        (product, method, i): partial(_run, weight, backend, product, method, values, x)
        for i, (weight, values), x in _problems(sizes, densities, dtype)
        for product, methods in METHODS.items()
        for method in methods
        if _is_measured(method, *GRID[i][1:])
    }
    with torch.inference_mode():
        found = fastest(calls, LARGE_ROUNDS if sizes == LARGE_SIZES else SMALL_ROUNDS)
    for (product, method, i), seconds in found.items():
        best[product][method][i] = seconds


def _is_measured(method: str, density: int, batch: int) -> bool:
    if method in AT_ANY_DENSITY:
        return density == DENSE_DENSITY
    if method == "bitmap":
        return batch <= LAST_BITMAP_BATCH
    return method != "row-wise" or density <= LAST_ROW_WISE[0] or batch <= LAST_ROW_WISE[1]


def _fill_in(methods: Seconds) -> None:
    """Scale what was measured to the points of the grid that were not."""
    for method, seconds in methods.items():
        at = dict(zip(GRID, seconds, strict=True))
        for size, density, batch in GRID:
            if not math.isinf(at[size, density, batch]):
                continue
            if method in AT_ANY_DENSITY:
                at[size, density, batch] = at[size, DENSE_DENSITY, batch]
            elif method == "bitmap" and batch > LAST_BITMAP_BATCH:
                at[size, density, batch] = at[size, density, batch - 1] * BATCHES[batch] / BATCHES[batch - 1]
            else:
                growth = DENSITIES[density] / DENSITIES[density - 1]
                if size > 0:
                    growth = at[size - 1, density, batch] / at[size - 1, density - 1, batch]
                at[size, density, batch] = at[size, density - 1, batch] * growth
        methods[method] = [at[point] for point in GRID]


def _problems(
    sizes: Sizes, densities: range, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[PreparedWeight, Tensor], Tensor]]:
    """Grid points, each with a weight, its values and tokens."""
    generator = torch.Generator().manual_seed(0)
    for i, (size, density, batch) in enumerate(GRID):
        if density not in densities or (sizes[size] == LARGE_SIZES[1] and density > LAST_LARGE_DENSITY):
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
