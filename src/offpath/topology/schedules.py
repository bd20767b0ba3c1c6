"""When a topology changes, and how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offpath.topology.settings import check_number, keep_whole


@dataclass(frozen=True)
class Every:
    """Due every `update_freq` steps from `start_step` on, before `end_step`; with `at_end`, at `end_step` as well.

    Steps are counted from 1, and step 0 is never due. `end_step=None` never ends.
    Raises `ValueError` for what is no whole number, a frequency below 1, an end before the start, or `at_end` without
    an end, and where no update would ever be due.

    >>> [step for step in range(12) if Every(3, end_step=9).due(step)]
    [3, 6]
    >>> [step for step in range(12) if Every(3, end_step=10, at_end=True).due(step)]
    [3, 6, 9, 10]
    """

    update_freq: int
    end_step: int | None = None
    start_step: int = 0
    at_end: bool = False

    def __post_init__(self) -> None:
        keep_whole(self, "update_freq", "start_step", *(["end_step"] if self.end_step is not None else []))
        if self.update_freq < 1:
            raise ValueError(f"expected update_freq of at least 1 step, got {self.update_freq}")
        _check_span(self.start_step, self.end_step)
        if self.at_end and self.end_step is None:
            raise ValueError("expected an end_step for an update at the end, got None")
        first = self.start_step or self.update_freq
        if self.end_step is not None and first >= self.end_step and not self.at_end:
            raise ValueError(
                f"expected an update before end_step={self.end_step}, but the first would be at step {first}; lower "
                "update_freq, or take Static for connections that stay"
            )

    def due(self, step: int) -> bool:
        """Whether the topology changes after optimizer step number `step`."""
        if step < max(self.start_step, 1) or (self.end_step is not None and step > self.end_step):
            return False
        if step == self.end_step:
            return self.at_end
        return (step - self.start_step) % self.update_freq == 0


@dataclass(frozen=True)
class Constant:
    """The same `drop_fraction` of the connections in every update (Mocanu et al., 2018)."""

    drop_fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.drop_fraction)

    def __call__(self, step: int) -> float:
        return self.drop_fraction


@dataclass(frozen=True)
class Cosine:
    """`drop_fraction` / 2 * (1 + cos(pi * step / end_step)), from all of it down to zero at `end_step`.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020.

    >>> schedule = Cosine(drop_fraction=0.3, end_step=100)
    >>> [round(schedule(step), 3) for step in (0, 50, 100)]
    [0.3, 0.15, 0.0]
    """

    drop_fraction: float
    end_step: int

    def __post_init__(self) -> None:
        _check_fraction(self.drop_fraction)
        keep_whole(self, "end_step")
        if self.end_step < 1:
            raise ValueError(f"expected end_step of at least 1, got {self.end_step}")

    def __call__(self, step: int) -> float:
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step, self.end_step) / self.end_step))


@dataclass(frozen=True)
class Cubic:
    """What a gradual pruning still has to go: all (1) up to `start_step`, nothing (0) at `end_step`, (1 - t)^3 between.

    So fast while many connections are superfluous, and slow at the end: Zhu & Gupta, "To prune, or not to prune", 2017.
    Raises `ValueError` for what is no whole number, or an end before the start.

    >>> [Cubic(end_step=10)(step) for step in (0, 5, 10)]
    [1.0, 0.125, 0.0]
    """

    end_step: int
    start_step: int = 0

    def __post_init__(self) -> None:
        keep_whole(self, "end_step", "start_step")
        _check_span(self.start_step, self.end_step)

    def __call__(self, step: int) -> float:
        t = min(max((step - self.start_step) / (self.end_step - self.start_step), 0.0), 1.0)
        return (1 - t) ** 3


DropFraction = Constant | Cosine


def drop_fraction_schedule(schedule: str, drop_fraction: float, end_step: int | None) -> DropFraction:
    """The schedule called "constant" or "cosine". Raises `ValueError` for another name, or "cosine" without an end."""
    if schedule == "constant":
        return Constant(drop_fraction)
    if schedule != "cosine":
        raise ValueError(f"expected schedule to be 'constant' or 'cosine', got {schedule!r}")
    if end_step is None:
        raise ValueError(
            "expected an end_step for the cosine schedule, got None; three quarters of the training steps is usual"
        )
    return Cosine(drop_fraction, end_step)


def _check_span(start_step: int, end_step: int | None) -> None:
    if start_step < 0 or (end_step is not None and end_step <= start_step):
        raise ValueError(f"expected 0 <= start_step < end_step, got start_step={start_step}, end_step={end_step}")


def _check_fraction(drop_fraction: float) -> None:
    check_number("drop_fraction", drop_fraction)
    if not 0 < drop_fraction <= 1:  # also refuses NaN
        raise ValueError(f"expected drop_fraction in (0, 1], got {drop_fraction}")
