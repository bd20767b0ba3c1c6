"""Times that other work on the machine has not lengthened, as far as the system tells.

A thread that shares its core waits for it in turns of milliseconds, and with it all threads that wait for its part of a
product. What is measured then says more about those turns than about the product, and would be kept for good.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")

# Waking up takes a thread microseconds, and a turn of another process at least most of a millisecond.
LEAST_WAIT_SECONDS, WAIT_SHARE = 2e-4, 0.05
# Of what takes seconds, such a share of other work is still a burst that the best of several times leaves out.
BURST_SHARE = 0.1
PROBE_SECONDS = 0.02
# A call whose every time was disturbed is timed in so many times the rounds.
PATIENCE = 3
_THREADS = "/proc/self/task"


def waited_seconds() -> float:
    """How long the threads of this process were ready to run and had no core, all together, since they began.

    From the second number of /proc/[pid]/task/[tid]/schedstat
    (https://docs.kernel.org/scheduler/sched-stats.html); 0 where the system does not count it.
    """
    try:
        threads = os.listdir(_THREADS)  # noqa: PTH208 (path objects take as long as the products do)
    except OSError:  # another system
        return 0.0
    waited = 0
    for thread in threads:
        try:
            with open(f"{_THREADS}/{thread}/schedstat", "rb", buffering=0) as file:  # noqa: PTH123 (as above)
                waited += int(file.read().split()[1])
        except (OSError, IndexError, ValueError):  # it has ended, or nobody counts
            continue
    return waited * 1e-9


def fastest(
    calls: Mapping[Key, Callable[[], object]], rounds: int, before: Mapping[Key, Callable[[], object]] | None = None
) -> dict[Key, float]:
    """The shortest time of each call, after a first one that is not timed; what stands `before` one never is.

    All are called in turns, so that a burst of other work hits one round of many calls instead of all rounds of one. Of
    a call that was disturbed in every round there are further rounds; the undisturbed times count, where there are any.
    """
    for call in calls.values():
        call()
    best, disturbed = dict.fromkeys(calls, math.inf), dict.fromkeys(calls, math.inf)
    before, waited = before or {}, waited_seconds()
    for round_ in range(PATIENCE * rounds):
        for key, call in calls.items():
            if round_ >= rounds and best[key] < math.inf:
                continue
            if key in before:
                before[key]()
                waited = waited_seconds()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            already, waited = waited, waited_seconds()
            kept = best if waited - already <= max(LEAST_WAIT_SECONDS, WAIT_SHARE * seconds) else disturbed
            kept[key] = min(kept[key], seconds)
    return {key: disturbed[key] if math.isinf(seconds) else seconds for key, seconds in best.items()}


def watched(work: Callable[[], Result]) -> tuple[Result, bool]:
    """What `work` returns, and whether the cores were its own but for a burst."""
    waited, start = waited_seconds(), time.perf_counter()
    result = work()
    return result, waited_seconds() - waited <= BURST_SHARE * (time.perf_counter() - start)


def cores_are_free() -> bool:
    """Whether the threads that torch uses have their cores for themselves now; takes `PROBE_SECONDS`."""
    matrix = torch.ones(512, 512, device="cpu")

    def work() -> None:
        end = time.perf_counter() + PROBE_SECONDS
        while time.perf_counter() < end:
            matrix @ matrix

    return watched(work)[1]
