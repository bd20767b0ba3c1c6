"""From which density on the dense product is faster than the one on sparse rows: measured once on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offpath.kernels.backend import Backend
from offpath.kernels.measured import measured_once
from offpath.kernels.operands import in_own_dtype
from offpath.kernels.undisturbed import fastest

# A batch and a weight that are large enough for the threads, and of which the rows still find the weight in the cache.
ROWS, COLUMNS, WIDTH, K = 256, 1024, 1024, 128
ROUNDS = 5
PRODUCTS = ("matmul", "dots", "weight_gradient")


def dense_dots(dy: Tensor, weight: Tensor, samples: Tensor, indices: Tensor) -> Tensor:
    """All products of a sample with a row of the weight, and of these the ones that are wanted."""
    with in_own_dtype(dy):
        products = dy @ weight.t()
    return products[samples, indices.long()]


@cache
def break_evens(backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    """For each of "matmul", "dots" and "weight_gradient", the density at which both ways take equally long.

    From the cache, or measured now, which takes a fraction of a second; float64 follows float32.
    """
    dtype = torch.float32 if dtype is torch.float64 else dtype
    facts: list[object] = [ROWS, COLUMNS, WIDTH, K]
    return measured_once("rows", backend.name, dtype, facts, _is_complete, lambda: measure(backend, dtype))


def _is_complete(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == set(PRODUCTS)
        and all(isinstance(density, float) and density > 0 for density in found.values())
    )


@torch.inference_mode()
def measure(backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    """Time both ways of each product in turns, and keep the best times."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(COLUMNS, WIDTH, generator=generator).to(dtype)
    dy = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    indices = torch.rand(ROWS, COLUMNS, generator=generator).topk(K).indices.sort().values
    values = torch.randn(ROWS * K, generator=generator).to(dtype)
    samples = torch.arange(ROWS).repeat_interleave(K)
    crow_indices, flat = torch.arange(ROWS + 1, dtype=torch.int32) * K, indices.flatten().int()
    rows = backend.rows

    def written_out() -> Tensor:
        places = samples * COLUMNS + flat
        return values.new_zeros(ROWS * COLUMNS).index_put_((places,), values, accumulate=True).view(ROWS, COLUMNS)

    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "matmul": (lambda: rows.matmul(crow_indices, flat, values, weight), lambda: written_out() @ weight),
        "dots": (
            lambda: rows.dots(crow_indices, flat, dy, weight),
            lambda: dense_dots(dy, weight, samples, flat),
        ),
        "weight_gradient": (
            lambda: rows.weight_gradient(crow_indices, flat, values, dy, COLUMNS),
            lambda: written_out().t() @ dy,
        ),
    }
    best = fastest({(name, i): way for name, ways in calls.items() for i, way in enumerate(ways)}, ROUNDS)
    # The sparse product takes as long as it has entries, the dense one always the same.
    return {name: K / COLUMNS * best[name, 1] / best[name, 0] for name in calls}
