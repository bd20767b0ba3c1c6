"""Each layer that is mostly zero beside the sparse one that may take its place: built, checked, timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from offpath.convert.compress.candidates import Candidate
from offpath.convert.compress.example import Example, Input, evaluating
from offpath.convert.compress.measure import Trial, in_rotation
from offpath.convert.compress.report import Measured
from offpath.convert.compress.verify import check_layer
from offpath.convert.compress.weights import CONVOLUTIONS, Dense, stand_in
from offpath.nn import Int8SparseLinear, SparseConv1d, SparseConv2d, SparseLinear

LATENCY_TOKENS, THROUGHPUT_TOKENS = 1, 256
BUDGET_SECONDS = 2.0
Progress = Callable[[int, int], object]
Sparse = SparseLinear | Int8SparseLinear | SparseConv1d | SparseConv2d


@dataclass(eq=False)
class Contest:
    """One layer: `inputs` are what it is timed with, and how many such calls a pass makes."""

    candidate: Candidate
    sparse: Sparse
    inputs: Counter[Input]
    measured: list[Measured] = field(default_factory=list)

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
        reason = "how large its images are only an example tells; give example="
    missed = [(c.name, reason) for c in candidates if c not in reached]
    found = []
    for done, candidate in enumerate(reached):
        dense = stand_in(candidate.module, candidate.name)
        if candidate.module in seen:
            inputs = Counter(seen[candidate.module])
        else:
            tokens = (LATENCY_TOKENS, THROUGHPUT_TOKENS) if batch is None else (batch,)
            assert isinstance(dense, nn.Linear)
            inputs = Counter(Input((t, dense.in_features), dense.weight.dtype) for t in tokens)
        found.append(Contest(candidate, _checked(candidate.name, dense, inputs, precision), inputs))
        progress(done + 1, 2 * len(reached))
    return found, missed


def measure(model: nn.Module, example: Example | None, entered: Sequence[Contest], progress: Progress) -> float:
    """Time every layer with every input of its; returns the seconds of a pass of the example in turns with them.

    Layers that have an n-th input are timed together, in the model's order.
    """
    stages = max((len(contest.inputs) for contest in entered), default=0)
    made: dict[Input, Tensor] = {}
    whole_seconds = 1.0  # nothing is to be compared with it
    for stage in range(stages):
        playing = [contest for contest in entered if len(contest.inputs) > stage]
        chosen = [list(contest.inputs.items())[stage] for contest in playing]
        trials = []
        for contest, (seen, _) in zip(playing, chosen, strict=True):
            if seen not in made:
                made[seen] = seen.random()
            trials.append(Trial(contest.key(seen), contest.dense, contest.sparse, made[seen]))
        also = example.run if example is not None and stage == 0 else _nothing
        tick = partial(_tick, progress, len(entered), stage, stages)
        with evaluating(model):
            rotation = in_rotation(trials, BUDGET_SECONDS, also, tick)
        for contest, (seen, calls), seconds in zip(playing, chosen, rotation.trials, strict=True):
            contest.measured.append(Measured(_positions(contest, seen), calls, *seconds))
        whole_seconds = rotation.also_seconds if stage == 0 else whole_seconds
    return whole_seconds


def _positions(contest: Contest, seen: Input) -> int:
    """Tokens, or the pixels of all images."""
    channels = contest.sparse.in_channels if isinstance(contest.sparse, (SparseConv1d, SparseConv2d)) else None
    return math.prod(seen.shape) // max(channels or seen.shape[-1], 1)


def _checked(name: str, dense: Dense, inputs: Counter[Input], precision: str | None) -> Sparse:
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
    for seen in inputs:
        check_layer(name, meant, layer, seen.random())
    return layer


def _nothing() -> None:
    pass


def _tick(progress: Progress, layers: int, stage: int, stages: int, share: float) -> None:
    progress(layers + int(layers * (stage + share) / stages), 2 * layers)
