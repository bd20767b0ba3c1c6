"""From which density on the dense product is faster than the one on sparse rows: measured once on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offpath.kernels.backend import Backend
from offpath.kernels.measured import measured_once
from offpath.kernels.undisturbed import fastest

# A batch that is large enough for the threads, and weights of so many rows: one that entries find in a cache, and one
# that they do not, where it gains more to read all rows in order.
ROWS, COLUMNS, WIDTH, LIVE = 256, (1024, 8192), 1024, 1 / 8
ROUNDS = 5
PRODUCTS = ("matmul", "dots", "weight_gradient")
BreakEvens = dict[str, list[float]]


def break_even(backend: Backend, dtype: torch.dtype, product: str, weight_entries: int) -> float:
    """The density at which both ways of "matmul", "dots" or "weight_gradient" take equally long.

    From the two weights measured: a power law between them, and constant beyond.
    """
    small, large = _break_evens(backend, dtype)[product]
    smallest, largest = (columns * WIDTH for columns in COLUMNS)
    way = math.log(min(max(weight_entries, smallest), largest) / smallest) / math.log(largest / smallest)
    return small ** (1 - way) * large**way


@cache
def _break_evens(backend: Backend, dtype: torch.dtype) -> BreakEvens:
    """From the cache, or measured now, which takes a second; float64 follows float32."""
    dtype = torch.float32 if dtype is torch.float64 else dtype
    facts: list[object] = [ROWS, COLUMNS, WIDTH, LIVE]
    return measured_once("rows", backend.name, dtype, facts, _is_complete, lambda: measure(backend, dtype))


def _is_complete(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == set(PRODUCTS)
        and all(
            isinstance(densities, list)
            and len(densities) == len(COLUMNS)
            and all(isinstance(density, float) and density > 0 for density in densities)
            for densities in found.values()
        )
    )


def measure(backend: Backend, dtype: torch.dtype) -> BreakEvens:
    """Time both ways of each product in turns, and keep the best times."""
    found = [_measure(backend, dtype, columns) for columns in COLUMNS]
    return {product: [densities[product] for densities in found] for product in PRODUCTS}


@torch.inference_mode()
def _measure(backend: Backend, dtype: torch.dtype, columns: int) -> dict[str, float]:
    k = int(LIVE * columns)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, WIDTH, generator=generator).to(dtype)
    dy = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    indices = torch.rand(ROWS, columns, generator=generator).topk(k).indices.sort().values
    values = torch.randn(ROWS * k, generator=generator).to(dtype)
    crow_indices, flat = torch.arange(ROWS + 1, dtype=torch.int32) * k, indices.flatten().int()
    rows = backend.rows

    def written_out() -> Tensor:
        return rows.written_out(crow_indices, flat, values, columns)

    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "matmul": (lambda: rows.matmul(crow_indices, flat, values, weight), lambda: written_out() @ weight),
        "dots": (
            lambda: rows.dots(crow_indices, flat, dy, weight),
            lambda: rows.dense_dots(crow_indices, flat, dy, weight),
        ),
        "weight_gradient": (
            lambda: rows.weight_gradient(crow_indices, flat, values, dy, columns),
            lambda: written_out().t() @ dy,
        ),
    }
    best = fastest({(name, i): way for name, ways in calls.items() for i, way in enumerate(ways)}, ROUNDS)
    # The sparse product takes as long as it has entries, the dense one always the same.
    return {name: LIVE * best[name, 1] / best[name, 0] for name in calls}
