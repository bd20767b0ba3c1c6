"""From which batch on the product over a plan beats the row-wise one: where `PLANNED_FROM_BATCH` comes from.

Run with: .venv/bin/python benchmarks/planned_from_batch.py
Prints the row-wise time over the planned one (above 1: the plan is faster), medians of interleaved runs, float32.
"""

from __future__ import annotations

from functools import partial

import torch

from measure import interleaved, machine_line, speedup
from offpath import kernels, pattern

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS, SAMPLE_SECONDS = 9, 0.01


def main() -> None:
    backend = kernels.select("cpu", torch.float32)
    print(machine_line())
    print("batch                     " + "".join(f"{batch:>7}" for batch in BATCHES))
    for inputs, outputs in ((1024, 1024), (768, 3072)):
        for sparsity in (0.5, 0.9, 0.95):
            p = pattern.random((outputs, inputs), round((1 - sparsity) * inputs * outputs))
            values, plan = torch.randn(p.nnz), backend.plan(p.crow_indices, p.col_indices, inputs)
            ratios = []
            for batch in BATCHES:
                x = torch.randn(batch, inputs)
                calls = {
                    "row-wise": partial(backend.spmm, p.crow_indices, p.col_indices, values, x),
                    "planned": partial(backend.planned_spmm, plan, values, x),
                }
                times = interleaved(calls, ROUNDS, SAMPLE_SECONDS)
                ratios.append(speedup(times["row-wise"], times["planned"]).ratio)
            print(
                f"{inputs} -> {outputs}, {sparsity:.0%}".ljust(26) + "".join(f"{r:>6.2f}x" for r in ratios), flush=True
            )


if __name__ == "__main__":
    main()
