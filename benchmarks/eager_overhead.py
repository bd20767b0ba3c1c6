"""What a call costs besides the arithmetic: a 64 x 64 layer at batch 16, against `nn.Linear`.

Run with: .venv/bin/python benchmarks/eager_overhead.py
Prints medians of interleaved runs and their ratios; the bar is 3x.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from measure import interleaved, machine_line
from offpath import SparseLinear

ROUNDS, SAMPLE_SECONDS = 31, 0.005


def _step(layer: nn.Module, x: torch.Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def main() -> None:
    torch.manual_seed(0)
    dense, sparse, x = nn.Linear(64, 64), SparseLinear(64, 64, sparsity=0.9), torch.randn(16, 64)
    print(machine_line())
    for name, grad, run in (
        ("forward, no grad", False, lambda layer, x: layer(x)),
        ("forward", True, lambda layer, x: layer(x)),
        ("forward + backward", True, _step),
    ):
        with torch.set_grad_enabled(grad):
            calls = {"dense": partial(run, dense, x), "sparse": partial(run, sparse, x)}
            times = interleaved(calls, ROUNDS, SAMPLE_SECONDS)
        d, s = (times[key].median_seconds * 1e6 for key in ("dense", "sparse"))
        print(f"{name:<20} nn.Linear {d:6.1f} us   SparseLinear {s:6.1f} us   ratio {s / d:.2f}")


if __name__ == "__main__":
    main()
