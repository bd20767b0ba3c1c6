"""What one meeting of a live entry and a connection costs on this machine: measured once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from offpath.kernels.backend import Backend
from offpath.kernels.measured import measured_once
from offpath.kernels.operands import row_numbers
from offpath.kernels.undisturbed import fastest

# A batch that keeps the threads busy, and a weight that does not fit into a second-level cache.
ROWS, WIDTH, DENSITY = 32, 2048, 0.1
ROUNDS = 5
# What the products on sparse rows compute, and the product over all connections that gives the same.
OVER_ALL_CONNECTIONS = {"sparse_matmul": "dx", "sparse_dots": "forward", "sparse_weight_gradient": "dvalues"}


@cache
def seconds_per_visit(backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    """For each product of sparse rows with a sparse weight, the seconds for one connection of one live entry.

    And as "finding" those for an entry of a dense matrix whose nonzeros, as few as in the rows, are looked for.
    From the cache, or measured now, which takes a fraction of a second; float64 follows float32.
    """
    dtype = torch.float32 if dtype is torch.float64 else dtype
    facts: list[object] = [ROWS, WIDTH, DENSITY]
    return measured_once("visits", backend.name, dtype, facts, _is_complete, lambda: measure(backend, dtype))


def _is_complete(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == {*OVER_ALL_CONNECTIONS, "finding"}
        and all(isinstance(seconds, float) and seconds > 0 for seconds in found.values())
    )


@torch.inference_mode()
def measure(backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    """Time each product in turns, and keep the best times."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = torch.rand(rows, WIDTH, generator=generator) < DENSITY
        crow_indices = torch.zeros(rows + 1, dtype=torch.int32)
        crow_indices[1:] = mask.sum(1).cumsum(0)
        indices = mask.nonzero()[:, 1].int()
        return crow_indices, indices, torch.randn(indices.shape, generator=generator).to(dtype)

    crow_indices, indices, values = drawn(ROWS)
    w_crow_indices, w_indices, w_values = drawn(WIDTH)
    dy = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    rows, products = (crow_indices, indices), backend.rows
    weight = w_crow_indices, w_indices
    x = values.new_zeros(ROWS, WIDTH).index_put((row_numbers(crow_indices), indices.long()), values)
    calls = {
        "sparse_matmul": lambda: products.sparse_matmul(*rows, values, *weight, w_values, WIDTH),
        "sparse_dots": lambda: products.sparse_dots(*rows, dy, *weight, w_values),
        "sparse_weight_gradient": lambda: products.sparse_weight_gradient(*rows, values, dy, *weight),
        "finding": lambda: products.above(x, None),
    }
    best = fastest(calls, ROUNDS)
    visits = int(w_crow_indices.diff()[indices.long()].sum())
    return {name: seconds / (x.numel() if name == "finding" else visits) for name, seconds in best.items()}
