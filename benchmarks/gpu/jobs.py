"""Figures that are timed together, and how a part works through its list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from contenders import Refused
from gpu.sheet import WAITED_OUT, Sheet
from gpu.timing import Call, Deadline, Effort, race
from measure import Timing, WrongResult, speedup
from offpath.cost.bounds import Expected, excess
from offpath.kernels import KernelError
from verdicts import Figure


@dataclass(frozen=True)
class Wanted:
    """A figure without its value: how many times faster `ours` is than the fastest of `over`."""

    figure: Figure
    ours: str
    over: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is timed together: the figures that follow, the kernels that have to be right for them, and the race.

    `measure` checks what it is going to time, and raises `WrongResult`, `KernelError` or `Refused` where there is
    nothing to time.
    """

    wanted: tuple[Wanted, ...]
    kernels: tuple[str, ...]
    measure: Callable[[], Raced]


@dataclass(frozen=True)
class Raced:
    """The times of every side, why the others have none, and which were replayed from CUDA graphs."""

    times: dict[str, Timing]
    refused: dict[str, str]
    replayed: frozenset[str] = frozenset()


@dataclass
class Sides:
    """What is going to be raced: for each side, its call once for every copy of its operands."""

    calls: dict[str, Sequence[Call]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def offer(self, name: str, make: Callable[[], Sequence[Call]]) -> None:
        """Add a side that may not be there, or not work here: it is tried first."""
        try:
            calls = make()
            calls[0]()
            torch.cuda.synchronize()
        except WrongResult:
            raise
        except Exception as error:  # of whatever kind, in a package that is not ours
            self.refused[name] = f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        else:
            self.calls[name] = calls

    def race(self, effort: Effort, graphs: bool = True) -> Raced:
        times, replayed = race(self.calls, effort, graphs)
        return Raced(times, self.refused, frozenset(times) if replayed else frozenset())


def work_through(jobs: Iterable[Job], sheet: Sheet, deadline: Deadline) -> None:
    """Measure one after the other while there is time; each result is in the file before the next begins."""
    for job in jobs:
        if deadline.left_seconds <= 0:
            _refuse(job, sheet, WAITED_OUT)
            continue
        try:
            raced = job.measure()
        except WrongResult as error:
            _refuse(job, sheet, f"wrong result: {error}", wrong=True)
        except torch.cuda.OutOfMemoryError as error:
            _refuse(job, sheet, f"the GPU's memory is too small: {str(error).split('. ')[0]}")
        except (KernelError, Refused) as error:
            _refuse(job, sheet, str(error))
        except Exception as error:  # whatever it is: the others may still be measured
            _refuse(job, sheet, f"failed: {type(error).__name__}: {error}".splitlines()[0], wrong=True)
        else:
            sheet.add_times(job.wanted[0].figure, raced.times, raced.replayed)
            for wanted in job.wanted:
                sheet.figures.append((filled(wanted, raced), job.kernels))
        sheet.save()


def filled(wanted: Wanted, raced: Raced) -> Figure:
    """The figure with its value, or why it has none."""
    over = [raced.times[name] for name in wanted.over if name in raced.times]
    if not over or wanted.ours not in raced.times:
        missing = wanted.over[0] if not over else wanted.ours
        return replace(wanted.figure, refused=raced.refused.get(missing, f"there is no time of {missing}"))
    best, ours = min(over, key=lambda timing: timing.median_seconds), raced.times[wanted.ours]
    found = speedup(best, ours)
    return replace(
        wanted.figure, value=found.ratio, spread=found.spread, seconds=(best.median_seconds, ours.median_seconds)
    )


def require(name: str, result: Tensor, right: Expected) -> None:
    """Raises `WrongResult` unless the result is within its bound: no time of a wrong one is taken."""
    times = excess(result, right)
    if times is not None:
        raise WrongResult(f"{name} is off by {times:.3g} times its bound")


def _refuse(job: Job, sheet: Sheet, reason: str, wrong: bool = False) -> None:
    for wanted in job.wanted:
        sheet.figures.append((replace(wanted.figure, refused=reason, wrong=wrong), job.kernels))
