"""From which batch on the product over a plan beats the row-wise one: where `PLANNED_FROM_BATCH` comes from.

Run with: .venv/bin/python benchmarks/planned_from_batch.py
Prints the row-wise time over the planned one (above 1: the plan is faster), medians of interleaved runs, float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from offpath import kernels, pattern
from offpath.cost import this_machine

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CALLS, ROUNDS = 20, 9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    backend, machine = kernels.select("cpu", torch.float32), this_machine()
    print(f"{machine.processor}, {machine.threads} threads, {machine.backend}, torch {machine.torch}")
    print("batch                     " + "".join(f"{batch:>7}" for batch in BATCHES))
    for inputs, outputs in ((1024, 1024), (768, 3072)):
        for sparsity in (0.5, 0.9, 0.95):
            p = pattern.random((outputs, inputs), round((1 - sparsity) * inputs * outputs))
            values, plan = torch.randn(p.nnz), backend.plan(p.crow_indices, p.col_indices, inputs)
            ratios = []
            for batch in BATCHES:
                x = torch.randn(batch, inputs)
                calls = (
                    lambda v=values, x=x, p=p: backend.spmm(p.crow_indices, p.col_indices, v, x),
                    lambda v=values, x=x, plan=plan: backend.planned_spmm(plan, v, x),
                )
                times = [[_seconds(call) for call in calls] for _ in range(ROUNDS)]
                row_wise, planned = (statistics.median(column) for column in zip(*times, strict=True))
                ratios.append(row_wise / planned)
            print(
                f"{inputs} -> {outputs}, {sparsity:.0%}".ljust(26) + "".join(f"{r:>6.2f}x" for r in ratios), flush=True
            )


if __name__ == "__main__":
    main()
