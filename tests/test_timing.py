"""Timing in turns, by a clock that the tests turn themselves: no real time is looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from offpath.cost.timing import BURST_SECONDS, MAX_ROUNDS, MIN_ROUNDS, Timing, TimingStopped, interleaved


class Clock:
    """Time that passes only while a call of `lasting` runs, and who was called in which order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def lasting(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that lasts as long as each of `seconds` says in turn, the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_medians_and_quartiles_are_those_of_the_rounds() -> None:
    clock = Clock()
    timings = interleaved({"a": clock.lasting("a", 1.0, 1.0, 3.0, 2.0), "b": clock.lasting("b", 8.0)}, 0.0, clock=clock)
    assert timings == {"a": Timing(2.0, (1.5, 2.5), 3, 1), "b": Timing(8.0, (8.0, 8.0), 3, 1)}


def test_calls_take_turns_and_every_other_round_goes_backwards() -> None:
    clock = Clock()
    interleaved({name: clock.lasting(name, 1.0) for name in "abc"}, 0.0, clock=clock)
    assert clock.called == list("abc") + list("abc" + "cba") * (MIN_ROUNDS // 2) + list("abc") * (MIN_ROUNDS % 2)


@pytest.mark.parametrize(
    ("budget_rounds", "rounds"), [(0, MIN_ROUNDS), (10, 10), (10 * MAX_ROUNDS, MAX_ROUNDS)], ids=["least", "b", "most"]
)
def test_rounds_fill_the_budget_within_their_limits(budget_rounds: int, rounds: int) -> None:
    clock = Clock()
    timings = interleaved(
        {"a": clock.lasting("a", 1.0), "b": clock.lasting("b", 3.0)}, 4.0 * budget_rounds, clock=clock
    )
    assert [timing.rounds for timing in timings.values()] == [rounds, rounds]


def test_short_calls_run_in_bursts_that_the_clock_can_see() -> None:
    clock = Clock()
    short = interleaved({"a": clock.lasting("a", BURST_SECONDS / 50)}, 0.0, clock=clock)["a"]
    assert short.calls_a_round == 50 and short.median_seconds == pytest.approx(BURST_SECONDS / 50)
    assert len(clock.called) == 2 + 50 * short.rounds


def test_call_that_takes_no_time_at_all_is_survived() -> None:
    clock = Clock()
    assert interleaved({"a": clock.lasting("a", 0.0)}, 1.0, clock=clock)["a"].median_seconds == 0.0


def test_nothing_to_time_gives_nothing() -> None:
    assert interleaved({}, 1.0) == {}


@pytest.mark.parametrize("calls_until_stop", [0, 1, 2, 7])
def test_request_to_stop_is_heard_between_calls(calls_until_stop: int) -> None:
    clock = Clock()
    calls = {"a": clock.lasting("a", 1.0), "b": clock.lasting("b", 1.0)}
    with pytest.raises(TimingStopped):
        interleaved(calls, 100.0, clock=clock, stop=lambda: len(clock.called) >= calls_until_stop)
    assert len(clock.called) == calls_until_stop


# Whole numbers, of which the quartiles are exact.
@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=40))
def test_quartiles_enclose_the_median_and_lie_among_the_rounds(whole_seconds: list[int]) -> None:
    seconds = [float(number) for number in whole_seconds]
    timing = Timing.of(seconds)
    lower, upper = timing.quartiles_seconds
    assert min(seconds) <= lower <= timing.median_seconds <= upper <= max(seconds)
    assert timing.rounds == len(seconds)
