"""How fast a `SparseLinear` is beside the `nn.Linear` of the same shape: forward, and forward + backward.

Run with: .venv/bin/python benchmarks/linear_layer.py
Prints ratios (above 1: the sparse layer is faster) of medians of interleaved runs, float32, token-major input. Each
layer's result is checked against the dense one in float64 before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from offpath import SparseLinear
from offpath.cost import this_machine

SHAPES = ((1024, 1024, 256), (768, 3072, 512), (2048, 2048, 1024))
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
CALLS, ROUNDS = 3, 11


def _check(sparse: SparseLinear, x: Tensor) -> None:
    exact = nn.functional.linear(x.double(), sparse.to_dense().weight.double(), sparse.bias.double())
    size = nn.functional.linear(x.double().abs(), sparse.to_dense().weight.double().abs(), sparse.bias.double().abs())
    bound = (sparse.in_features + 1) * torch.finfo(x.dtype).eps * size
    if bool(((sparse(x).double() - exact).abs() > bound).any()):
        raise SystemExit("the sparse layer computed a wrong result; no speed is reported")


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(dy)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def _ratio(dense: Callable[[], object], sparse: Callable[[], object]) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    for call in (dense, sparse):
        call()
    for _ in range(ROUNDS):
        for call, kept in zip((dense, sparse), times, strict=True):
            kept.append(_seconds(call))
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    machine = this_machine()
    print(f"{machine.processor}, {machine.threads} threads, {machine.backend}, torch {machine.torch}")
    print("in -> out, batch              " + "".join(f"{sparsity:>8.0%}" for sparsity in SPARSITIES))
    for inputs, outputs, batch in SHAPES:
        forward, step = [], []
        for sparsity in SPARSITIES:
            dense, sparse = nn.Linear(inputs, outputs), SparseLinear(inputs, outputs, sparsity=sparsity)
            x, dy = torch.randn(batch, inputs), torch.randn(batch, outputs)
            with torch.no_grad():
                _check(sparse, x)
                forward.append(_ratio(lambda d=dense, x=x: d(x), lambda s=sparse, x=x: s(x)))
            x.requires_grad_()
            step.append(_ratio(lambda d=dense, x=x, g=dy: _step(d, x, g), lambda s=sparse, x=x, g=dy: _step(s, x, g)))
        shape = f"{inputs} -> {outputs}, {batch}"
        print(f"{shape:<20} forward   " + "".join(f"{ratio:>7.2f}x" for ratio in forward), flush=True)
        print(f"{'':<20} training  " + "".join(f"{ratio:>7.2f}x" for ratio in step), flush=True)


if __name__ == "__main__":
    main()
