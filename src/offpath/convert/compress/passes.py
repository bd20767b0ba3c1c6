"""Dense and sparse layers timed where they stand, in whole passes of the model on the example."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from offpath.convert.compress.example import Example, evaluating
from offpath.convert.compress.measure import rounds_that_fit
from offpath.convert.fused_encoders import called_by_encoders
from offpath.convert.swap import swapped

Seconds = dict[nn.Module, list[float]]


@dataclass(frozen=True)
class Passes:
    """Seconds of each call of each layer in its order, by the dense layer; and of all else in a pass.

    The rest is quicker beside sparse layers, which leave it more of the caches.
    """

    rest_seconds: float
    rest_beside_sparse_seconds: float
    dense: Seconds
    sparse: Seconds


@torch.no_grad()
def in_passes(
    example: Example,
    replacements: Mapping[nn.Module, nn.Module],
    calls: Mapping[nn.Module, int],
    budget_seconds: float,
    tick: Callable[[float], object],
) -> Passes:
    """Time each layer of `replacements` and its sparse one, which stands in the model for every second pass.

    There each layer finds the caches as the layers before it leave them. After one round to warm up come as many as fit
    the budget; all times are medians. The model has its dense layers again afterwards, whatever happens. Raises
    `ValueError` unless each dense layer, or the one in its place, gets its `calls` in every pass.
    """
    back = {sparse: dense for dense, sparse in replacements.items()}
    rest: list[float] = []
    rest_beside_sparse: list[float] = []
    dense: dict[nn.Module, list[list[float]]] = defaultdict(list)
    sparse: dict[nn.Module, list[list[float]]] = defaultdict(list)

    def each_once() -> None:
        whole, seconds = _timed(example, replacements)
        check(seconds)
        # What disturbs a pass disturbs its layers: the difference says more than two passes would.
        rest.append(whole - sum(map(sum, seconds.values())))
        for module, timed in seconds.items():
            dense[module].append(timed)
        with swapped(example.model, replacements):
            whole, timed_sparse = _timed(example, back)
        seconds = {back[module]: timed for module, timed in timed_sparse.items()}
        check(seconds)
        rest_beside_sparse.append(whole - sum(map(sum, seconds.values())))
        for module, timed in seconds.items():
            sparse[module].append(timed)

    def check(seconds: Seconds) -> None:
        for module, timed in seconds.items():
            if len(timed) != calls[module]:
                raise ValueError(
                    f"expected a model that calls its layers as often whenever it is called with the example, got "
                    f"{calls[module]} and then {len(timed)} calls of a {type(module).__name__}: it keeps a state, "
                    "draws random numbers, or holds a layer elsewhere than as a child module. Leave that out, or give "
                    "batch= instead"
                )

    start = time.perf_counter()
    each_once()
    rounds = rounds_that_fit(budget_seconds, time.perf_counter() - start)
    for times in (rest, rest_beside_sparse, dense, sparse):
        times.clear()
    for number in range(rounds):
        each_once()
        tick((number + 1) / rounds)
    return Passes(median(rest), median(rest_beside_sparse), _medians(dense), _medians(sparse))


def _timed(example: Example, modules: Mapping[nn.Module, nn.Module]) -> tuple[float, Seconds]:
    """Seconds of a pass that follows another one, and of each call of each of these modules in it.

    What the layers just swapped out left in the caches is gone by then.
    """
    seconds: Seconds = {module: [] for module in modules}
    with evaluating(example.model), called_by_encoders(example.model, modules):
        example.call()
        with _stopwatches(seconds):
            start = time.perf_counter()
            example.call()
            return time.perf_counter() - start, seconds


@contextmanager
def _stopwatches(seconds: Seconds) -> Iterator[None]:
    started: dict[nn.Module, float] = {}

    def start(module: nn.Module, args: Any) -> None:
        started[module] = time.perf_counter()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        seconds[module].append(time.perf_counter() - started[module])

    handles = []
    try:
        for module in seconds:
            handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop, prepend=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _medians(rounds: Mapping[nn.Module, list[list[float]]]) -> Seconds:
    return {module: [median(calls) for calls in zip(*passes, strict=True)] for module, passes in rounds.items()}
