"""SparseConv2d at 90 % beside nn.Conv2d: the forward pass and a training step, on two threads.

Run with: .venv/bin/python benchmarks/convolutions.py [--dtype bfloat16] [--out FILE]
Prints medians of rounds in which all take turns. The dense rival runs contiguous and channels-last, and the faster of
both counts; so does the sparse layer. A training step is the forward pass and the gradients of input, weight and bias.
A pointwise convolution also stands beside the SparseLinear that computes the same numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from measure import at_least_one, check_product, machine_line, print_and_write
from offpath import SparseLinear
from offpath.cost import keep_freed_memory
from offpath.nn import SparseConv2d

CHANNELS, SPARSITY, THREADS = 256, 0.9, 2
SIZES, BATCHES = (14, 28, 56), (1, 32)
FORWARD_BAR, STEP_BAR = 3.0, 2.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            layer(x)

    return call


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), dy)


def _check(layer: SparseConv2d, x: Tensor, dy: Tensor) -> None:
    """Compare what is timed with float64, raising `WrongResult`: of a batch, what the first image gives."""

    def results(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
        y = nn.functional.conv2d(*leaves, padding=layer.padding)
        return y, *torch.autograd.grad(y, leaves, dy.double())

    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    dx, dvalues, dbias = torch.autograd.grad(y, (leaf, layer.values, layer.bias), dy)
    weight, bias = layer.to_dense().weight, layer.bias
    exact = results(x[:1], weight, bias, dy[:1])
    size = results(x[:1].abs(), weight.abs(), bias.abs(), dy[:1].abs())
    terms = torch.tensor(layer.in_channels * weight[0, 0].numel() + 1)
    check_product("y", y[:1].detach(), exact[0].detach(), size[0].detach(), terms)
    check_product("dX", dx[:1], exact[1], size[1], terms)
    if x.shape[0] == 1:
        positions = torch.tensor(x[0, 0].numel())
        connected = layer.pattern.to_mask()
        check_product("dW", dvalues, exact[2].flatten(1)[connected], size[2].flatten(1)[connected], positions)
        check_product("db", dbias, exact[3], size[3], positions)


def _medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def _better(medians: dict[str, float], name: str) -> float:
    return min(seconds for key, seconds in medians.items() if key.startswith(name))


def _lines(size: int, batch: int, kernel: int, rounds: int, dtype: torch.dtype) -> Iterator[str]:
    sparse = SparseConv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, sparsity=SPARSITY).to(dtype)
    dense = sparse.to_dense()
    x, dy = (torch.randn(batch, CHANNELS, size, size).to(dtype) for _ in range(2))
    forward, step = {}, {}
    for name, memory_format in FORMATS.items():
        own_x, own_dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
        _check(sparse, own_x, own_dy)
        rival = sparse.to_dense().to(memory_format=memory_format) if name == "channels-last" else dense
        for kind, layer in (("sparse", sparse), ("dense", rival)):
            forward[f"{kind} {name}"] = _forward(layer, own_x)
            step[f"{kind} {name}"] = _step(layer, own_x, own_dy)
    if kernel == 1:
        linear = SparseLinear(CHANNELS, CHANNELS, pattern=sparse.pattern).to(dtype)
        tokens, dtokens = (t.permute(0, 2, 3, 1).reshape(-1, CHANNELS).contiguous() for t in (x, dy))
        forward["linear"], step["linear"] = _forward(linear, tokens), _step(linear, tokens, dtokens)
    for what, calls, bar in (("forward", forward, FORWARD_BAR), ("training step", step, STEP_BAR)):
        medians = _medians(calls, rounds)
        ours, rival_seconds = _better(medians, "sparse"), _better(medians, "dense")
        shown = f", SparseLinear {medians['linear'] * 1e3:8.2f} ms" if "linear" in medians else ""
        if kernel > 1 and dtype is torch.float32:
            shown = f" (bar {bar:g})"
        both = " / ".join(f"{medians[f'sparse {name}'] * 1e3:.2f}" for name in FORMATS)
        dense_both = " / ".join(f"{medians[f'dense {name}'] * 1e3:.2f}" for name in FORMATS)
        yield (
            f"{kernel}x{kernel} {size:>2} x {size:<2} batch {batch:>2} {what:<13} {rival_seconds / ours:5.2f} x{shown}"
            f"   sparse {both} ms, dense {dense_both} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/convolutions.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=11, help="default: %(default)s; a third for batches")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    layer = f"{CHANNELS} -> {CHANNELS} channels, {SPARSITY:.0%} sparse, {options.dtype}"
    head = [machine_line(), f"{layer}; contiguous / channels-last"]
    tables = (
        _lines(
            size, batch, kernel, options.rounds if batch == 1 else max(1, options.rounds // 3), DTYPES[options.dtype]
        )
        for kernel in (3, 1)
        for size in SIZES
        for batch in BATCHES
    )
    print_and_write(chain(head, chain.from_iterable(tables)), options.out)


if __name__ == "__main__":
    main()
