"""What a call on a GPU costs the host, beside plain torch: of small layers and few tokens, that is the time it takes.

Run with: .venv/bin/python benchmarks/gpu_host.py
Needs no GPU: the driver is a stand-in that computes nothing, and tensors lie in the CPU's memory, so layers are tiny.
Torch's own kernels do compute, on the CPU. Prints medians of interleaved runs and their ratios.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import standin
from gpu.autoencoder import dense_loss
from measure import interleaved, machine_line
from offpath import SparseLinear, kernels
from offpath.nn import PackedSparseLinear, SparseAutoencoder, SparseInputLinear

WIDTH, SPARSITY = 16, 0.9
ROUNDS, SAMPLE_SECONDS = 31, 0.005


@dataclass(frozen=True)
class Pair:
    """The same done by torch and by us, whose products of layers are computed by `method`."""

    name: str
    torchs: Callable[[], object]
    ours: Callable[[], object]
    method: str = "row-wise"
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode


def pairs() -> Iterator[Pair]:
    dense = nn.Linear(WIDTH, WIDTH)
    for method in ("row-wise", "dense"):
        for tokens in (1, 16):
            layer = SparseLinear(WIDTH, WIDTH, sparsity=SPARSITY)  # which remembers the method for so many tokens
            x, dy = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
            name = f"SparseLinear {method}, {tokens} token{'s' if tokens > 1 else ''}"
            yield Pair(f"{name}, inference", partial(dense, x), partial(layer, x), method)
            steps = (partial(_step, one, x, dy) for one in (dense, layer))
            yield Pair(f"{name}, step", *steps, method, torch.enable_grad)
    x = torch.randn(1, WIDTH)
    packed = PackedSparseLinear.from_sparse(SparseLinear(WIDTH, WIDTH, sparsity=SPARSITY), tokens=8)
    yield Pair("PackedSparseLinear, 1 token, inference", partial(dense, x), partial(packed, x))
    live = SparseInputLinear(WIDTH, WIDTH)
    yield Pair("SparseInputLinear, 1 token, inference", partial(dense, x), partial(live, x))
    sae, x = SparseAutoencoder(WIDTH, 4 * WIDTH, k=4, aux_coefficient=0), torch.randn(16, WIDTH)
    losses = partial(dense_loss, sae, x), lambda: sae.loss(x).total
    steps = (partial(_step_of_loss, sae, loss) for loss in losses)
    yield Pair("SparseAutoencoder, 16 tokens, step", *steps, mode=torch.enable_grad)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(dy)


def _step_of_loss(sae: SparseAutoencoder, loss: Callable[[], Tensor]) -> None:
    sae.zero_grad()
    loss().backward()


def table(driver: standin.Driver, rounds: int = ROUNDS, sample_seconds: float = SAMPLE_SECONDS) -> Table:
    """The times of all pairs, and how many kernels of ours are launched."""
    made = Table("Call", "Launches", "torch", "offpath", "Ratio")
    for pair in pairs():
        with pair.mode(), kernels.forced(standin.backend(pair.method)):
            pair.ours()  # finds out what is known of the connections, and compiles
            before = driver.last.count
            pair.ours()
            launches = driver.last.count - before
            times = interleaved({"torch": pair.torchs, "offpath": pair.ours}, rounds, sample_seconds)
        torchs, ours = (times[who].median_seconds * 1e6 for who in ("torch", "offpath"))
        made.add_row(pair.name, str(launches), f"{torchs:.1f} us", f"{ours:.1f} us", f"{ours / torchs:.2f}")
    return made


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{machine_line()}, Triton {triton.__version__}; no GPU")
    with tempfile.TemporaryDirectory() as folder:
        Console(width=100).print(table(standin.install(Path(folder))))


if __name__ == "__main__":
    main()
