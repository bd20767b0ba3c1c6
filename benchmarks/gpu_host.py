"""What a call on a GPU costs the host, beside `nn.Linear`: what an eager step of a small layer takes, GPU or not.

Run with: .venv/bin/python benchmarks/gpu_host.py
Needs no GPU: the driver is a stand-in that computes nothing, and tensors lie in the CPU's memory, so that layers are
tiny. Prints medians of interleaved runs and their ratios.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import nn

import standin
from measure import interleaved, machine_line
from offpath import SparseLinear, kernels
from offpath.nn import PackedSparseLinear, SparseInputLinear

WIDTH, SPARSITY = 16, 0.9
ROUNDS, SAMPLE_SECONDS = 31, 0.005


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(dy)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{machine_line()}, Triton {triton.__version__}; layers of {WIDTH} x {WIDTH}, no GPU")
    table = Table("Call", "Launches", "nn.Linear", "offpath", "Ratio")
    with tempfile.TemporaryDirectory() as folder:
        driver = standin.install(Path(folder))
        dense = nn.Linear(WIDTH, WIDTH)
        sparse = [SparseLinear(WIDTH, WIDTH, sparsity=SPARSITY) for _ in range(4)]  # each remembers its methods
        packed, live = PackedSparseLinear.from_sparse(sparse[0], tokens=8), SparseInputLinear(WIDTH, WIDTH)
        ways = [(method, tokens) for method in ("row-wise", "dense") for tokens in (1, 16)]
        rows = [("SparseLinear", *way, layer) for way, layer in zip(ways, sparse, strict=True)]
        rows += [("PackedSparseLinear", "", 1, packed), ("SparseInputLinear", "", 1, live)]
        for name, method, tokens, layer in rows:
            x, dy = (torch.randn(tokens, WIDTH) for _ in range(2))
            calls = [("inference", torch.inference_mode, lambda one, x=x: one(x))]
            if method:
                calls.append(("step", torch.enable_grad, partial(_step, x=x.clone().requires_grad_(), dy=dy)))
            for what, mode, call in calls:
                with mode(), kernels.forced(standin.backend(method or "row-wise")):
                    call(layer)
                    before = driver.last.count
                    call(layer)
                    launches = driver.last.count - before
                    times = interleaved({one: partial(call, one) for one in (dense, layer)}, ROUNDS, SAMPLE_SECONDS)
                ours, torchs = (times[one].median_seconds * 1e6 for one in (layer, dense))
                label = f"{name}{method and ' ' + method}, {tokens} token{'s' if tokens > 1 else ''}, {what}"
                table.add_row(label, str(launches), f"{torchs:.1f} us", f"{ours:.1f} us", f"{ours / torchs:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
