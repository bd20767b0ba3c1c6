"""What a call costs besides the arithmetic: a 64 x 64 layer at batch 16, against `nn.Linear`.

Run with: .venv/bin/python benchmarks/eager_overhead.py
Prints medians of interleaved runs and their ratios; the bar is 3x.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from offpath import SparseLinear
from offpath.cost import this_machine

CALLS, ROUNDS = 300, 31


def _step(layer: nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    torch.manual_seed(0)
    dense, sparse, x = nn.Linear(64, 64), SparseLinear(64, 64, sparsity=0.9), torch.randn(16, 64)
    machine = this_machine()
    print(f"{machine.processor}, {machine.threads} threads, {machine.backend}, torch {machine.torch}")
    for name, grad, run in (
        ("forward, no grad", False, lambda layer: layer(x)),
        ("forward", True, lambda layer: layer(x)),
        ("forward + backward", True, lambda layer: _step(layer, x)),
    ):
        with torch.set_grad_enabled(grad):
            times: dict[str, list[float]] = {"dense": [], "sparse": []}
            for _ in range(ROUNDS):
                times["dense"].append(_microseconds(lambda run=run: run(dense)))
                times["sparse"].append(_microseconds(lambda run=run: run(sparse)))
        d, s = (statistics.median(times[key]) for key in ("dense", "sparse"))
        print(f"{name:<20} nn.Linear {d:6.1f} us   SparseLinear {s:6.1f} us   ratio {s / d:.2f}")


if __name__ == "__main__":
    main()
