"""What every benchmark shares: interleaved medians, the machine in words, and the check that comes before any time."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from contenders import Contender
from offpath.cost import keep_freed_memory, this_machine
from offpath.cost.bounds import expected
from offpath.studies.files import write_text

Key = TypeVar("Key", bound=Hashable)
MAX_REPEATS = 1000


class WrongResult(Exception):
    """A contender computed a result outside its error bound: no time of it is reported."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one entry a round; entry i of every contender of a run was taken in the same round."""

    seconds: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Speedup:
    """How many times faster one contender is than another.

    `spread` is half the interquartile range of the ratios of single rounds, as a share of `ratio`.
    """

    ratio: float
    spread: float


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    sample_seconds: float = 0.01,
    own_pools: bool = False,
    after_round: Callable[[], object] = lambda: None,
) -> dict[Key, Timing]:
    """Time every call once a round, in an order that turns with the round, after two calls to warm up.

    Interleaved, so that a slower spell of the machine meets every contender. A sample repeats its call for about
    `sample_seconds`, so that neither the clock nor the caches that the others left decide. With `own_pools`, contenders
    have thread pools of their own: an untimed call comes before each sample, while the others' threads go to sleep.
    From then on, the process keeps what is freed.
    """
    keep_freed_memory()
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = min(MAX_REPEATS, max(1, math.ceil(sample_seconds / max(_sample(call, 1), 1e-9))))
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if own_pools:
                calls[name]()
            samples[name].append(_sample(calls[name], repeats[name]))
        after_round()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def speedup(slow: Timing, fast: Timing) -> Speedup:
    """The ratio of the medians, and how much the ratios of single rounds vary."""
    ratio = slow.median_seconds / fast.median_seconds
    by_round = [s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)]
    if len(by_round) < 2:
        return Speedup(ratio, 0.0)
    lower, _, upper = statistics.quantiles(by_round, n=4, method="inclusive")
    return Speedup(ratio, (upper - lower) / 2 / ratio)


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """y, dX, dW and db of one step, as it comes after an optimizer has written to the parameters.

    Nothing is written, but the version counters move: what a layer keeps until its parameters change has to be made
    again, as in training.
    """
    for parameter in layer.parameters():
        parameter.grad = None
        torch.autograd.graph.increment_version(parameter)
    x.grad = None
    y = layer(x)
    y.backward(dy)
    return y


def check_forward(contender: Contender, x: Tensor) -> None:
    """Compare y with float64; raises `WrongResult`."""
    with torch.no_grad():
        _check_y(contender, x, contender.layer(x))


def check_step(contender: Contender, x: Tensor, dy: Tensor) -> None:
    """Compare y, dX, dW and db of a training step with float64; raises `WrongResult`."""
    x = x.detach().requires_grad_()
    check_gradients(contender, x, training_step(contender.layer, x, dy), dy)


@torch.no_grad()
def check_gradients(contender: Contender, x: Tensor, y: Tensor, dy: Tensor) -> None:
    """Compare y = layer(x), and all gradients that a backward pass left for dy, with float64; raises `WrongResult`."""
    _check_y(contender, x, y)
    weight, x64, dy64 = contender.weight().double(), x.double(), dy.double()
    if x.grad is not None:
        terms = (weight != 0).sum(0)
        check_product(f"{contender.name}: dX", x.grad, dy64 @ weight, dy64.abs() @ weight.abs(), terms)
    rows, columns, gradient = contender.weight_gradient()
    batch = torch.tensor(x.shape[0])
    exact, size = dy64.t() @ x64, dy64.abs().t() @ x64.abs()
    check_product(f"{contender.name}: dW", gradient, exact[rows, columns], size[rows, columns], batch)
    check_product(f"{contender.name}: db", contender.layer.bias.grad, dy64.sum(0), dy64.abs().sum(0), batch)


@torch.no_grad()
def _check_y(contender: Contender, x: Tensor, y: Tensor) -> None:
    weight, bias, x64 = contender.weight().double(), contender.layer.bias.double(), x.double()
    exact = nn.functional.linear(x64, weight, bias)
    size = nn.functional.linear(x64.abs(), weight.abs(), bias.abs())
    check_product(f"{contender.name}: y", y, exact, size, (weight != 0).sum(1) + 1)


def check_product(
    name: str, result: Tensor, exact: Tensor, size: Tensor, terms: Tensor, rounded: Tensor | None = None
) -> None:
    """Raises `WrongResult` for what lies outside its bound; `rounded` are sizes of what was rounded on the way."""
    if result.shape != exact.shape:
        raise WrongResult(f"{name} should have shape {tuple(exact.shape)}, has {tuple(result.shape)}")
    bound = expected(exact, size, terms, result.dtype).bound
    if rounded is not None:
        bound += torch.finfo(result.dtype).eps / 2 * (rounded + bound)
    wrong = ~((result.double() - exact).abs() <= bound)  # NaN is wrong, too
    if bool(wrong.any()):
        raise WrongResult(f"{name} is outside its error bound in {int(wrong.sum())} of {wrong.numel()} entries")


def at_least_one(text: str) -> int:
    """The type of an argument that counts what is done, such as rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def machine_line() -> str:
    """The machine, in the words that stand above every table of times."""
    machine = this_machine()
    return f"{machine.processor}, {machine.threads} threads, {machine.backend}, torch {machine.torch}"


def print_and_write(lines: Iterable[str], out: Path) -> None:
    """Print the lines as they come, and write them to a file when all are there."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(printed) + "\n")


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
