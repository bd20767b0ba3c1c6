"""Sparse weights and sparse activations together, against sparse weights alone.

Run with: .venv/bin/python benchmarks/two_sparsities.py [--out FILE] [--rounds N]
Everything of one table is measured in turns. Results are compared with float64 before any time is reported. `rows` is
SparseSparseLinear on `SparseRows`; `dense input` is the same layer with the same activations as a dense tensor, whose
nonzeros it has to find. GB/s are the bytes of the live connections (index and value) over the time of `rows`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from measure import at_least_one, check_product, dtype_name, interleaved, machine_line, print_and_write, speedup
from offpath import SparseLinear
from offpath.nn import SparseSparseLinear
from offpath.ops import SparseRows

WIDTH = 4096
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def _pair(sparsity: float, dtype: torch.dtype) -> tuple[SparseLinear, SparseSparseLinear]:
    layer = SparseLinear(
        WIDTH, WIDTH, bias=False, dtype=dtype, sparsity=sparsity, generator=torch.Generator().manual_seed(0)
    )
    return layer, SparseSparseLinear.from_sparse_linear(layer)


def _activations(batch: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    x = torch.rand(batch, WIDTH) + 0.5
    live = round((1 - sparsity) * WIDTH)
    return torch.zeros(batch, WIDTH).scatter(1, torch.rand(batch, WIDTH).topk(live).indices, x).to(dtype)


@torch.no_grad()
def _check(layer: SparseLinear, y: Tensor, x: Tensor) -> None:
    weight, x = layer.to_dense().weight.double(), x.double()
    check_product("y", y, x @ weight.t(), x.abs() @ weight.abs().t(), (x != 0).sum(1)[:, None])


def forward(rounds: int) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        pair = _pair(0.9, dtype)
        for batch in (1, 8, 64):
            yield _forward(*pair, batch, rounds)


@torch.no_grad()
def _forward(alone: SparseLinear, both: SparseSparseLinear, batch: int, rounds: int) -> str:
    dtype = both.values.dtype
    x = _activations(batch, 0.9, dtype)
    rows = SparseRows.from_dense(x)
    _check(alone, both(rows), x)
    timings = interleaved(
        {"alone": lambda: alone(x), "rows": lambda: both(rows), "dense input": lambda: both(x)}, rounds
    )
    live_connections = float(rows.counts().double() @ both.pattern.row_counts.double())
    gigabytes = live_connections * (both.values.element_size() + 4) / timings["rows"].median_seconds / 1e9
    found, of_dense = (speedup(timings["alone"], timings[name]) for name in ("rows", "dense input"))
    microseconds = {name: timing.median_seconds * 1e6 for name, timing in timings.items()}
    return (
        f"forward, 90 % and 90 %, batch {batch:3d}, {dtype_name(dtype)}: SparseLinear {microseconds['alone']:7.0f} us, "
        f"rows {microseconds['rows']:6.0f} us, {found.ratio:5.2f} (+-{found.spread:4.0%}) times as fast, from a dense "
        f"input {of_dense.ratio:5.2f}; {gigabytes:4.1f} GB/s"
    )


def training_step(rounds: int) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _training_step(*_pair(0.9, dtype), 128, rounds)


def _training_step(alone: SparseLinear, both: SparseSparseLinear, batch: int, rounds: int) -> str:
    """Forward and backward to the values of the weight and the live activations."""
    dtype = both.values.dtype
    x = _activations(batch, 0.9, dtype).requires_grad_()
    rows, dy = SparseRows.from_dense(x.detach()), torch.randn(batch, WIDTH).to(dtype)
    values = rows.values.clone().requires_grad_()
    timings = interleaved(
        {
            "alone": lambda: torch.autograd.grad(alone(x), (x, *alone.parameters()), dy),
            "rows": lambda: torch.autograd.grad(both(rows.with_values(values)), (values, *both.parameters()), dy),
        },
        rounds,
    )
    found = speedup(timings["alone"], timings["rows"])
    return (
        f"training step, 90 % and 90 %, batch {batch}, {dtype_name(dtype)}: SparseLinear "
        f"{timings['alone'].median_seconds * 1e3:6.2f} ms, rows {timings['rows'].median_seconds * 1e3:6.2f} ms, "
        f"{found.ratio:5.2f} (+-{found.spread:4.0%}) times as fast"
    )


@torch.no_grad()
def densities(rounds: int) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        yield f"us at batch 1, {dtype_name(dtype)}" + "".join(f"{f'activations {s:.0%}':>18}" for s in SPARSITIES)
        layers = {sparsity: _pair(sparsity, dtype)[1] for sparsity in SPARSITIES}
        inputs = {sparsity: SparseRows.from_dense(_activations(1, sparsity, dtype)) for sparsity in SPARSITIES}
        for weights, layer in layers.items():
            calls = {sparsity: lambda rows=rows, layer=layer: layer(rows) for sparsity, rows in inputs.items()}
            timings = interleaved(calls, rounds)
            times = "".join(f"{timings[s].median_seconds * 1e6:18.0f}" for s in SPARSITIES)
            yield f"{f'weights {weights:.0%}':<20}{times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/two_sparsities.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds of each table (default: %(default)s)")
    options = parser.parse_args()
    tables = (table(options.rounds) for table in (forward, training_step, densities))
    print_and_write(chain([machine_line()], chain.from_iterable(tables)), options.out)


if __name__ == "__main__":
    main()
