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
from offpath.convert.compress.example import Example, evaluating
from offpath.convert.compress.measure import Trial, in_rotation
from offpath.convert.compress.report import Measured
from offpath.convert.compress.verify import check_layer
from offpath.convert.compress.weights import stand_in
from offpath.nn import Int8SparseLinear, SparseLinear

LATENCY_TOKENS, THROUGHPUT_TOKENS = 1, 256
BUDGET_SECONDS = 2.0
Progress = Callable[[int, int], object]
Input = tuple[tuple[int, ...], torch.dtype]


@dataclass(eq=False)
class Contest:
    """One layer: `inputs` are the shapes and dtypes it is timed with, and how many such calls a pass makes."""

    candidate: Candidate
    sparse: SparseLinear | Int8SparseLinear
    inputs: Counter[Input]
    measured: list[Measured] = field(default_factory=list)

    @property
    def dense(self) -> nn.Module:
        """The layer that the model has."""
        return self.candidate.module

    def stand_in(self) -> nn.Linear:
        """The `nn.Linear` that computes what the dense layer does."""
        return stand_in(self.candidate.module, self.candidate.name)

    def key(self, seen: Input) -> Hashable:
        """The same for layers of the same sizes whose densities differ by less than a tenth."""
        density = round(10 * math.log(self.sparse.density)) if self.sparse.nnz else None
        sizes = self.sparse.out_features, self.sparse.in_features, self.sparse.bias is None
        return type(self.dense), self.sparse.values.dtype, sizes, density, seen


def contests(
    candidates: Sequence[Candidate],
    batch: int | None,
    example: Example | None,
    precision: str | None,
    progress: Progress,
) -> tuple[list[Contest], list[tuple[str, str]]]:
    """A contest for each candidate, its sparse layer checked; and (name, reason) of those that the example misses.

    Raises `RuntimeError`, naming the layer, for one that computes something else.
    """
    seen = None if example is None else example.inputs([c.module for c in candidates])
    reached = [c for c in candidates if seen is None or c.module in seen]
    reason = "the example does not reach it, so that nothing tells what it is used for"
    missed = [(c.name, reason) for c in candidates if c not in reached]
    found = []
    for done, candidate in enumerate(reached):
        dense = stand_in(candidate.module, candidate.name)
        if seen is not None:
            inputs = Counter(seen[candidate.module])
        else:
            tokens = (LATENCY_TOKENS, THROUGHPUT_TOKENS) if batch is None else (batch,)
            inputs = Counter(((t, dense.in_features), dense.weight.dtype) for t in tokens)
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
                made[seen] = random_input(*seen)
            trials.append(Trial(contest.key(seen), contest.dense, contest.sparse, made[seen]))
        also = example.run if example is not None and stage == 0 else _nothing
        tick = partial(_tick, progress, len(entered), stage, stages)
        with evaluating(model):
            rotation = in_rotation(trials, BUDGET_SECONDS, also, tick)
        for contest, ((shape, _), calls), seconds in zip(playing, chosen, rotation.trials, strict=True):
            contest.measured.append(Measured(math.prod(shape[:-1]), calls, *seconds))
        whole_seconds = rotation.also_seconds if stage == 0 else whole_seconds
    return whole_seconds


def random_input(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, the same for the same shape; leaves torch's global generator alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _checked(
    name: str, dense: nn.Linear, inputs: Counter[Input], precision: str | None
) -> SparseLinear | Int8SparseLinear:
    sparse = SparseLinear.from_dense(dense)
    layer = sparse if precision is None else Int8SparseLinear.from_sparse(sparse)
    # What int8 weights stand for, which is not quite what the dense ones do.
    meant = layer.to_sparse(torch.float64).to_dense() if isinstance(layer, Int8SparseLinear) else dense
    for seen in inputs:
        check_layer(name, meant, layer, random_input(*seen))
    return layer


def _nothing() -> None:
    pass


def _tick(progress: Progress, layers: int, stage: int, stages: int, share: float) -> None:
    progress(layers + int(layers * (stage + share) / stages), 2 * layers)
