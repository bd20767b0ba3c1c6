"""Timing several ways of computing the same thing, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

# A burst has to be long beside the clock's resolution and the cost of reading it.
BURST_SECONDS = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 3, 31
# A call that takes as long as this needs no second one to warm up.
LONG_SECONDS = 0.05

Name = TypeVar("Name")


class TimingStopped(Exception):
    """Somebody asked for the end before enough rounds were measured; there is no result."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds and its quartiles. A round is a burst of so many calls."""

    median_seconds: float
    quartiles_seconds: tuple[float, float]
    rounds: int
    calls_a_round: int

    @classmethod
    def of(cls, seconds: list[float], calls_a_round: int = 1) -> Timing:
        """Sum up the seconds of a call in each round.

        >>> Timing.of([3.0, 1.0, 2.0])
        Timing(median_seconds=2.0, quartiles_seconds=(1.5, 2.5), rounds=3, calls_a_round=1)
        """
        several = len(seconds) > 1
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if several else seconds * 3
        return cls(median, (lower, upper), len(seconds), calls_a_round)

    def of_one_in(self, calls: int) -> Timing:
        """The timing of one call, where each that was timed is so many of them."""
        lower, upper = self.quartiles_seconds
        return Timing(
            self.median_seconds / calls, (lower / calls, upper / calls), self.rounds, self.calls_a_round * calls
        )


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    budget_seconds: float,
    *,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Timing]:
    """Time each of `calls` in turns, so that whatever disturbs the machine hits all of them alike.

    Every call runs twice to warm up, a long one once. Then come rounds, in which each runs in a burst of about a
    millisecond; every other round goes backwards, so that none always follows the same one. It ends after
    `budget_seconds` of rounds, but not before 3 of them, or after 31. Raises `TimingStopped` soon after `stop()` has
    become true.

    >>> timings = interleaved({"sum": lambda: sum(range(100)), "nothing": lambda: None}, budget_seconds=0.01)
    >>> list(timings)
    ['sum', 'nothing']
    """
    bursts = {name: _calls_a_burst(call, clock, stop) for name, call in calls.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    start, rounds = clock(), 0
    while calls and rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or clock() - start < budget_seconds):
        for name in list(calls)[:: -1 if rounds % 2 else 1]:
            if stop():
                raise TimingStopped
            seconds[name].append(_seconds_a_call(calls[name], bursts[name], clock))
        rounds += 1
    return {name: Timing.of(seconds[name], bursts[name]) for name in calls}


def _calls_a_burst(call: Callable[[], object], clock: Callable[[], float], stop: Callable[[], bool]) -> int:
    for _ in range(2):  # the first call alone may prepare what later ones find
        if stop():
            raise TimingStopped
        seconds = _seconds_a_call(call, 1, clock)
        if seconds >= LONG_SECONDS:
            break
    return max(1, math.ceil(BURST_SECONDS / max(seconds, 1e-7)))


def _seconds_a_call(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls
