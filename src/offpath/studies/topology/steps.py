"""What a training step of each arm takes, measured while nothing else runs."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offpath.studies.topology.config import TaskConfig
from offpath.studies.topology.task import Task
from offpath.studies.topology.trial import Training

# The arms take turns of a few steps, so that whatever disturbs the machine hits all of them.
TURN_STEPS = 10
MAX_TURNS = 24
# Often enough for a median over updates; what they cost counts by how often they really come.
UPDATE_FREQ = 30


@dataclass
class _Times:
    """Seconds of the steps of an arm: of plain ones by the update that they follow, and of those around updates."""

    plain: dict[int, list[float]] = field(default_factory=dict)
    with_update: list[float] = field(default_factory=list)
    first_after: list[float] = field(default_factory=list)

    def take(self, training: Training) -> None:
        """Advance by one step and put its time where it belongs."""
        before, start = training.updates, time.perf_counter()
        training.advance()
        seconds = time.perf_counter() - start
        if training.updates > before:
            self.with_update.append(seconds)
        elif len(self.first_after) < before:
            self.first_after.append(seconds)  # makes the plans of the new connections
        elif training.step > 2:
            self.plain.setdefault(before, []).append(seconds)

    def seconds_per_step(self, update_freq: int) -> float:
        """The mean over a whole training, each stretch between updates by its median."""
        steps = sum(map(len, self.plain.values()))
        plain = sum(len(stretch) * statistics.median(stretch) for stretch in self.plain.values()) / steps
        if not self.with_update:
            return plain
        around = statistics.median(self.with_update) + statistics.median(self.first_after)
        return plain + (around - 2 * plain) / update_freq


def turns(config: TaskConfig) -> int:
    """How many turns each arm of a task gets."""
    return max(1, min(MAX_TURNS, config.steps // TURN_STEPS))


def measure_steps(task: Task, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Seconds of a training step of each arm of `task`, by its name; updates of the connections included.

    `progress` is called after each turn. The connections move as in a training of as many steps as are timed, so that
    those of GMP, which become fewer, are averaged over the whole of it.
    """
    quick = copy.copy(task)
    quick.config = replace(task.config, update_freq=min(UPDATE_FREQ, task.config.update_freq))
    trainings = {arm: Training(quick, arm, 0, turns(task.config) * TURN_STEPS, 1e-3) for arm in task.config.arms}
    times = {arm: _Times() for arm in trainings}
    for turn in range(turns(task.config)):
        for arm in list(trainings)[:: -1 if turn % 2 else 1]:
            for _ in range(TURN_STEPS):
                times[arm].take(trainings[arm])
        progress()
    return {arm.name: times[arm].seconds_per_step(task.config.update_freq) for arm in times}
