"""Dense and sparse layers timed as a model calls them: one after the other, so that each finds the caches cold."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

MIN_ROUNDS, MAX_ROUNDS = 5, 31


@dataclass(frozen=True)
class Trial:
    """A dense layer and the sparse one that may take its place, for one input.

    Trials of the same `key` (same sizes, about the same sparsity) are expected to take the same time.
    """

    key: Hashable
    dense: nn.Module
    sparse: nn.Module
    x: Tensor


@torch.no_grad()
def in_rotation(
    trials: Sequence[Trial],
    budget_seconds: float,
    tick: Callable[[float], object] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """The shortest seconds of a call, (dense, sparse) of each trial: what disturbs a machine makes it longer only.

    Trials of one key get the median of theirs. In a round, all dense layers run once in their order, and so do all
    sparse ones. A layer alone, called again and again, would find its weights in the cache, where a model's other
    layers leave no room for them. After one round to warm up come as many as fit the budget, but at least 5. `tick`
    gets the share that is done.
    """
    calls: dict[str, Callable[[], list[float]]] = {
        "dense": lambda: _seconds([partial(trial.dense, trial.x) for trial in trials], clock),
        "sparse": lambda: _seconds([partial(trial.sparse, trial.x) for trial in trials], clock),
    }
    start = clock()
    for call in calls.values():
        call()
    rounds = rounds_that_fit(budget_seconds, clock() - start)
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            samples[name].append(calls[name]())
        tick((number + 1) / rounds)
    dense, sparse = (_by_key(trials, samples[name]) for name in ("dense", "sparse"))
    return [(dense[trial.key], sparse[trial.key]) for trial in trials]


def rounds_that_fit(budget_seconds: float, seconds_of_one: float) -> int:
    """How many rounds to measure: the more, the shorter they are."""
    return min(max(math.ceil(budget_seconds / max(seconds_of_one, 1e-6)), MIN_ROUNDS), MAX_ROUNDS)


def _seconds(calls: Sequence[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    times = [clock()]
    for call in calls:
        call()
        times.append(clock())
    return [after - before for before, after in pairwise(times)]


def _by_key(trials: Sequence[Trial], rounds: Sequence[Sequence[float]]) -> dict[Hashable, float]:
    shortest: dict[Hashable, list[float]] = defaultdict(list)
    for trial, seconds in zip(trials, zip(*rounds, strict=True), strict=True):
        shortest[trial.key].append(min(seconds))
    return {key: statistics.median(seconds) for key, seconds in shortest.items()}
