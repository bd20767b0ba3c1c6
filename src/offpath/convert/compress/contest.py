"""Each layer that is mostly zero beside the sparse one that may take its place: built, checked, timed."""

from __future__ import annotations

import copy
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from offpath.convert.compress.candidates import Candidate
from offpath.convert.compress.example import Example, Input, evaluating
from offpath.convert.compress.measure import Trial, in_rotation
from offpath.convert.compress.passes import in_passes
from offpath.convert.compress.report import NEEDS_EXAMPLE, Measured
from offpath.convert.compress.verify import check_layer
from offpath.convert.compress.weights import CONVOLUTIONS, Dense, stand_in
from offpath.cost import memory_bytes
from offpath.nn import Int8SparseLinear, SparseConv1d, SparseConv2d, SparseLinear

LATENCY_TOKENS, THROUGHPUT_TOKENS = 1, 256
# Among them, every way to compute a layer has its place.
TOKENS = tuple(1 << exponent for exponent in range(9))
BUDGET_SECONDS = 2.0
Progress = Callable[[int, int], object]
Sparse = SparseLinear | Int8SparseLinear | SparseConv1d | SparseConv2d


@dataclass(eq=False)
class Contest:
    """One layer: `calls` are what it is timed with; with an example, in the order in which a pass brings them."""

    candidate: Candidate
    sparse: Sparse
    calls: list[Input]
    measured: list[Measured] = field(default_factory=list)

    @torch.no_grad()
    def bytes_at_most(self) -> int:
        """What the sparse layer takes once it has been called with few tokens and with many.

        Each way to compute prepares what it needs when it is first chosen. Found with a copy, which is given back.
        """
        if isinstance(self.sparse, SparseConv1d | SparseConv2d):  # asks for the sizes of images
            return memory_bytes(self.sparse)
        layer, seen = copy.deepcopy(self.sparse), self.calls[0]
        with seen.surroundings():
            for tokens in TOKENS:
                layer(torch.zeros(tokens, layer.in_features, dtype=seen.dtype))
        return max(memory_bytes(layer), memory_bytes(self.sparse))

    @property
    def dense(self) -> nn.Module:
        """The layer that the model has."""
        return self.candidate.module

    def stand_in(self) -> Dense:
        """The plain layer that computes what the dense layer does."""
        return stand_in(self.candidate.module, self.candidate.name)

    def key(self, seen: Input) -> Hashable:
        """The same for layers of the same sizes whose densities differ by less than a tenth."""
        density = round(10 * math.log(self.sparse.density)) if self.sparse.nnz else None
        sizes = self.sparse.out_features, self.sparse.in_features, self.sparse.bias is None
        convolution = self.dense.extra_repr() if self.candidate.kind in CONVOLUTIONS else None
        return type(self.dense), self.sparse.values.dtype, sizes, convolution, density, seen


def contests(
    candidates: Sequence[Candidate],
    batch: int | None,
    example: Example | None,
    precision: str | None,
    goal: str,
    progress: Progress,
) -> tuple[list[Contest], list[tuple[str, str]]]:
    """A contest for each candidate, its sparse layer checked; and (name, reason) of those whose inputs nothing tells.

    Raises `RuntimeError`, naming the layer, for one that computes something else.
    """
    if example is not None:
        seen = example.inputs([c.module for c in candidates])
        reached = [c for c in candidates if c.module in seen]
        reason = "the example does not reach it, so that nothing tells what it is used for"
    else:
        seen = {}
        reached = [c for c in candidates if c.kind not in CONVOLUTIONS]
        reason = NEEDS_EXAMPLE
    missed = [(c.name, reason) for c in candidates if c not in reached]
    found = []
    for done, candidate in enumerate(reached):
        dense = stand_in(candidate.module, candidate.name)
        if candidate.module in seen:
            calls = seen[candidate.module]
        else:
            tokens = (LATENCY_TOKENS, THROUGHPUT_TOKENS) if batch is None else (batch,)
            assert isinstance(dense, nn.Linear)
            calls = [Input((t, dense.in_features), dense.weight.dtype) for t in tokens]
        found.append(Contest(candidate, _checked(candidate.name, dense, calls, precision, goal), calls))
        progress(done + 1, 2 * len(reached))
    return found, missed


@dataclass(frozen=True)
class Rest:
    """Seconds of all but the measured layers in a pass of the example, beside dense ones and beside sparse ones."""

    beside_dense: float
    beside_sparse: float

    def beside(self, swapped: float) -> float:
        """The same where layers that take this share of the dense ones' time are sparse."""
        return max(self.beside_dense + swapped * (self.beside_sparse - self.beside_dense), 0.0)


def measure(model: nn.Module, example: Example | None, entered: Sequence[Contest], progress: Progress) -> Rest | None:
    """Time every layer with every input of its, and the rest of the model with an example.

    Layers of one key are expected to take the same time: each gets the median of theirs.
    """
    if not entered:
        return None
    tick = partial(_tick, progress, len(entered))
    if example is None:
        _measure_in_rotation(model, entered, tick)
        return None
    replacements = {contest.dense: contest.sparse for contest in entered}
    calls = {contest.dense: len(contest.calls) for contest in entered}
    passes = in_passes(example, replacements, calls, BUDGET_SECONDS, tick)
    of_key: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for contest in entered:
        times = zip(contest.calls, passes.dense[contest.dense], passes.sparse[contest.dense], strict=True)
        for seen, dense, sparse in times:
            of_key[contest.key(seen)].append((dense, sparse))
    for contest in entered:
        for seen, count in Counter(contest.calls).items():
            dense, sparse = map(statistics.median, zip(*of_key[contest.key(seen)], strict=True))
            contest.measured.append(Measured(_positions(contest, seen), count, dense, sparse))
    return Rest(passes.rest_seconds, passes.rest_beside_sparse_seconds)


def _measure_in_rotation(model: nn.Module, entered: Sequence[Contest], tick: Callable[[float], object]) -> None:
    """Layers that have an n-th input are timed together, in the model's order."""
    stages = len(entered[0].calls)
    for stage in range(stages):
        trials = [Trial(c.key(c.calls[stage]), c.dense, c.sparse, c.calls[stage].random()) for c in entered]
        with evaluating(model):
            times = in_rotation(trials, BUDGET_SECONDS, partial(_tick_of_stage, tick, stage, stages))
        for contest, seconds in zip(entered, times, strict=True):
            contest.measured.append(Measured(_positions(contest, contest.calls[stage]), 1, *seconds))


def _positions(contest: Contest, seen: Input) -> int:
    """Tokens, or the pixels of all images."""
    channels = contest.sparse.in_channels if isinstance(contest.sparse, (SparseConv1d, SparseConv2d)) else None
    return math.prod(seen.shape) // max(channels or seen.shape[-1], 1)


def _checked(name: str, dense: Dense, calls: Sequence[Input], precision: str | None, goal: str) -> Sparse:
    layer: Sparse
    meant = dense
    if isinstance(dense, nn.Conv2d):
        layer = SparseConv2d.from_dense(dense)
    elif isinstance(dense, nn.Conv1d):
        layer = SparseConv1d.from_dense(dense)
    else:
        layer = SparseLinear.from_dense(dense)
        if precision is not None:
            layer = Int8SparseLinear.from_sparse(layer)
            # What int8 weights stand for is not quite what the dense ones do.
            meant = layer.to_sparse(torch.float64).to_dense()
        if goal == "size":  # of speed, a plan for other numbers of tokens than these could take more than it saves
            layer.prefer = "memory"
    for seen in dict.fromkeys(calls):
        with seen.surroundings():
            check_layer(name, meant, layer, seen.random())
    return layer


def _tick(progress: Progress, layers: int, share: float) -> None:
    progress(layers + int(layers * share), 2 * layers)


def _tick_of_stage(tick: Callable[[float], object], stage: int, stages: int, share: float) -> None:
    tick((stage + share) / stages)
