"""From which sparsity on a sparse product is faster than the dense one: checked first, then timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from offpath.cost.bounds import Expected, excess
from offpath.cost.timing import Timing, TimingStopped, interleaved

PRODUCTS = ("forward", "dx", "dweight", "step")
DENSE, OFFPATH, TORCH_SPARSE = METHODS = ("dense", "offpath", "torch.sparse")
# What else a GPU offers: dense float32 rounded to 10 bits, and two of four weights that do not exist.
TF32, SEMI_STRUCTURED = "dense TF32", "torch 2:4"


@dataclass(frozen=True, order=True)
class Case:
    """What is computed, whatever the sparsity: one row of the table."""

    in_features: int
    out_features: int
    dtype: str
    product: str
    batch: int


@dataclass(frozen=True)
class Contender:
    """One way of computing a product, and what its results must be.

    `way` tells two ways of one method apart. One of `refusals` means that the method does not compute this case.
    Something that is `only_for_reference` and slow is not called often. `repeated` makes what is timed in place of
    `run`, and says how many calls that is: of copies of the operands, so that none of them is still in a cache.
    """

    method: str
    way: str
    run: Callable[[], Sequence[Tensor]]
    expected: Sequence[Expected]
    refusals: tuple[type[Exception], ...] = ()
    only_for_reference: bool = False
    repeated: Callable[[], tuple[Callable[[], object], int]] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a contender: `timing` is there if, and only if, its results were right."""

    method: str
    way: str
    status: Literal["measured", "wrong", "not computed"]
    reason: str = ""
    timing: Timing | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Outcome:
        """The outcome that `dataclasses.asdict` gave."""
        timing = values["timing"]
        if timing is not None:
            timing = Timing(**timing | {"quartiles_seconds": tuple(timing["quartiles_seconds"])})
        return cls(**values | {"timing": timing})


@dataclass(frozen=True)
class Point:
    """One case at one sparsity, with the outcome of every contender."""

    case: Case
    sparsity: float
    outcomes: tuple[Outcome, ...]

    def timing(self, method: str) -> Timing | None:
        """The fastest way of `method`; None when none was right and measured."""
        timings = [o.timing for o in self.outcomes if o.method == method and o.timing]
        return min(timings, key=lambda timing: timing.median_seconds, default=None)

    def speedup(self, method: str) -> float | None:
        """Median dense time over median time of `method`: above 1, `method` is faster."""
        dense, other = self.timing(DENSE), self.timing(method)
        return dense.median_seconds / other.median_seconds if dense and other else None

    def speedup_quartiles(self, method: str) -> tuple[float, float] | None:
        """The speed-up if one of both were at its slow quartile and the other at its fast one."""
        dense, other = self.timing(DENSE), self.timing(method)
        if not (dense and other):
            return None
        (dense_low, dense_high), (low, high) = dense.quartiles_seconds, other.quartiles_seconds
        return dense_low / high, dense_high / low

    def reasons(self, method: str, status: str) -> list[str]:
        """Why ways of `method` ended in `status`."""
        return [outcome.reason for outcome in self.outcomes if (outcome.method, outcome.status) == (method, status)]


@dataclass(frozen=True)
class BreakEven:
    """The smallest sparsity from which on the sparse way is never slower.

    `found` says how it is known: "between" two measured sparsities (interpolated); at the "lowest" one measured, so
    that the real one is there or below; or "never" up to the highest one measured, and `sparsity` is None.
    """

    sparsity: float | None
    found: Literal["between", "lowest", "never"]
    measured_from: float
    measured_to: float

    def __str__(self) -> str:
        if self.sparsity is None:
            return f"> {100 * self.measured_to:.4g}%"
        return f"≤ {100 * self.sparsity:.4g}%" if self.found == "lowest" else f"{self.sparsity:.0%}"


def break_even(points: Iterable[tuple[float, float]]) -> BreakEven:
    """The break-even of (sparsity, speed-up) points, linear in log time over log density between two of them.

    Raises `ValueError` without points.

    >>> print(break_even([(0.5, 0.5), (0.75, 2.0), (0.9, 4.0)]))
    65%
    >>> print(break_even([(0.1, 1.5), (0.9, 4.0)]), "and", break_even([(0.5, 0.2), (0.9, 0.9)]))
    ≤ 10% and > 90%
    """
    ordered = sorted(points)
    if not ordered:
        raise ValueError("expected at least one (sparsity, speed-up) point, got none")
    ends = ordered[0][0], ordered[-1][0]
    slower = [index for index, (_, speedup) in enumerate(ordered) if speedup < 1]
    if not slower:
        return BreakEven(ends[0], "lowest", *ends)
    if slower[-1] == len(ordered) - 1:
        return BreakEven(None, "never", *ends)
    (before, slow), (after, fast) = ordered[slower[-1] : slower[-1] + 2]
    part = -math.log(slow) / (math.log(fast) - math.log(slow))
    log_density = math.log1p(-before) + part * (math.log1p(-after) - math.log1p(-before))
    # Clamped: rounding must not put it outside the interval that it was found in.
    return BreakEven(min(max(-math.expm1(log_density), before), after), "between", *ends)


def measure(
    contenders: Iterable[Contender],
    budget_seconds: float,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Outcome, ...]:
    """Compare each contender's results with what they must be; time, in turns, those that are right.

    A contender that is only for reference and takes longer than the whole budget is timed by its one checked call.
    Raises `TimingStopped` soon after `stop()` has become true.

    >>> import torch
    >>> one = Expected(exact=torch.ones(1).double(), bound=torch.full((1,), 1e-6).double())
    >>> right, wrong = (Contender("dense", "", lambda y=y: [torch.tensor([y])], [one]) for y in (1.0, 2.0))
    >>> [outcome.status for outcome in measure([right, wrong], budget_seconds=0.01)]
    ['measured', 'wrong']
    """
    contenders = list(contenders)
    outcomes: dict[int, Outcome] = {}
    for place, contender in enumerate(contenders):
        if stop():
            raise TimingStopped
        settled = _settled_by_its_first_call(contender, budget_seconds, clock)
        if settled is not None:
            outcomes[place] = settled
    right = {place: contender for place, contender in enumerate(contenders) if place not in outcomes}
    repeated = {place: (c.run, 1) if c.repeated is None else c.repeated() for place, c in right.items()}
    calls = {place: call for place, (call, _) in repeated.items()}
    for place, timing in interleaved(calls, budget_seconds, stop=stop, clock=clock).items():
        of_one_call = timing.of_one_in(repeated[place][1])
        outcomes[place] = Outcome(contenders[place].method, contenders[place].way, "measured", timing=of_one_call)
    return tuple(outcomes[place] for place in range(len(contenders)))


def _settled_by_its_first_call(
    contender: Contender, budget_seconds: float, clock: Callable[[], float]
) -> Outcome | None:
    """The outcome of one that needs no further call; None for a right one, which is to be timed."""
    start = clock()
    try:
        results = contender.run()
    except contender.refusals as error:
        return Outcome(contender.method, contender.way, "not computed", str(error))
    seconds = clock() - start
    over = [excess(result, right) for result, right in zip(results, contender.expected, strict=True)]
    if any(over):
        worst = max(times for times in over if times is not None)
        return Outcome(contender.method, contender.way, "wrong", f"off by {worst:.3g} times the error bound")
    if contender.only_for_reference and seconds > budget_seconds:
        return Outcome(contender.method, contender.way, "measured", timing=Timing.of([seconds]))
    return None
