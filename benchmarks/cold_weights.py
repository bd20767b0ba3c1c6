"""A few tokens through more weights than the caches hold, as those of a large model: what memory delivers decides.

Run with: .venv/bin/python benchmarks/cold_weights.py [--size N] [--layers N] [--step] [--out FILE]
Takes four minutes and, as it stands, 3 GB of memory. All layers are called in turn, so that none finds its weight in a
cache (at high sparsity some of it may stay there, as in a model that small); other benchmarks repeat one layer. For how
many times as long `nn.Linear` of the same dtype takes, and the sparse layer's milliseconds: medians of interleaved
rounds. Results are compared with float64 before any time is taken. A dense step (--step) also takes memory for a dense
gradient, which costs it more at some times than at others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from contenders import of_sparse_linear
from measure import (
    at_least_one,
    check_forward,
    check_step,
    dtype_name,
    interleaved,
    machine_line,
    print_and_write,
    speedup,
    training_step,
)
from offpath import SparseLinear

SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
TOKENS = (1, 2, 4, 8, 16, 32)
DTYPES = (torch.float32, torch.bfloat16)


def table(dtype: torch.dtype, options: argparse.Namespace) -> Iterator[str]:
    """A line for each number of tokens, a column for each sparsity: dense time over sparse time, and the latter."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        sparsities = progress.track(SPARSITIES, description=f"measuring {dtype_name(dtype)}")
        columns = [list(_cells(dtype, sparsity, options)) for sparsity in sparsities]
    what = "training step" if options.step else "forward"
    yield f"{dtype_name(dtype)} {what}, {options.layers} layers of {options.size} -> {options.size} in turn"
    yield f"{'tokens':<9}" + "".join(f"{sparsity:>7.0%}{'ms':>8}" for sparsity in SPARSITIES)
    for tokens, *cells in zip(TOKENS, *columns, strict=True):
        yield f"{tokens:<9}" + "".join(cells)


def _cells(dtype: torch.dtype, sparsity: float, options: argparse.Namespace) -> Iterator[str]:
    size = options.size
    dense = [nn.Linear(size, size, dtype=dtype) for _ in range(options.layers)]
    sparse = [SparseLinear(size, size, sparsity=sparsity, dtype=dtype) for _ in range(options.layers)]
    for tokens in TOKENS:
        x, dy = (torch.randn(tokens, size, dtype=dtype) for _ in range(2))
        check = partial(check_step, dy=dy) if options.step else check_forward
        check(of_sparse_linear(sparse[0]), x)
        times = interleaved(
            {"dense": _call(dense, x, dy, options.step), "sparse": _call(sparse, x, dy, options.step)},
            options.rounds,
            sample_seconds=0,
        )
        ratio, seconds = speedup(times["dense"], times["sparse"]).ratio, times["sparse"].median_seconds
        yield f"{ratio:6.2f}x{seconds * 1e3 / options.layers:8.2f}"


def _call(layers: Sequence[nn.Module], x: Tensor, dy: Tensor, step: bool) -> Callable[[], None]:
    def train() -> None:
        for layer in layers:
            training_step(layer, x.detach().requires_grad_(), dy)

    @torch.no_grad()
    def infer() -> None:
        for layer in layers:
            layer(x)

    return train if step else infer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=at_least_one, default=4096, help="inputs and outputs (default: %(default)s)")
    parser.add_argument("--layers", type=at_least_one, default=8, help="layers in turn (default: %(default)s)")
    parser.add_argument("--step", action="store_true", help="the training step, not the forward product")
    parser.add_argument("--rounds", type=at_least_one, default=11, help="rounds of each figure (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/cold_weights.txt"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    tables = (table(dtype, options) for dtype in DTYPES)
    print_and_write(chain([machine_line()], chain.from_iterable(tables)), options.out)


if __name__ == "__main__":
    main()
