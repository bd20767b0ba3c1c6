"""What came out of a study, and what can be said of it."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from offpath.studies.config import RunError
from offpath.studies.files import five_digits
from offpath.studies.topology.config import Arm, StudyConfig, Trial
from offpath.studies.topology.folder import StudyFolder

FORMAT_VERSION = 1
CURVE = ("step", "train_loss", "loss", "accuracy")
# Student's t: 95 % of the means of so many draws lie within so many standard errors.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Cell:
    """An arm of a task: what the trials of all its seeds came to. `final` and `curves` are by seed.

    A final value is the test accuracy after the last step, of a text the held-out loss. A curve is a list of `CURVE`.
    """

    task: str
    arm: Arm
    learning_rate: float
    parameters: int
    stored_bytes: int
    training_bytes: int
    moved_share: float | None
    updates: int
    final: dict[int, float]
    curves: dict[int, list[list[float | None]]]

    @property
    def mean(self) -> float:
        """Mean of the final values."""
        return statistics.mean(self.final.values())

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the final values; 0 of a single one."""
        return statistics.stdev(self.final.values()) if len(self.final) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """How much one arm is above another, by the seeds that both have: these share data order and initial weights."""

    seeds: int
    mean: float
    half_width: float

    @property
    def separates(self) -> bool:
        """Whether the 95 % interval of the mean leaves out zero."""
        return self.half_width < abs(self.mean)

    @classmethod
    def between(cls, one: Cell, other: Cell) -> Difference | None:
        """`one` minus `other`; None with fewer than two seeds in common.

        >>> cells = [Cell("t", Arm("dense"), 1e-3, 1, 4, 16, None, 0, dict(enumerate(v)), {}) for v in ((5, 6), (3, 4))]
        >>> Difference.between(*cells)
        Difference(seeds=2, mean=2, half_width=0.0)
        """
        shared = sorted(one.final.keys() & other.final.keys())
        if len(shared) < 2:
            return None
        differences = [one.final[seed] - other.final[seed] for seed in shared]
        error = statistics.stdev(differences) / math.sqrt(len(shared))
        quantile = T_95.get(len(shared), 2.0)
        return cls(len(shared), statistics.mean(differences), quantile * error)


@dataclass(frozen=True)
class StudyResult:
    """The cells that have a trial at least, and the times of the steps by task: title, machine, seconds by arm."""

    config: StudyConfig
    cells: tuple[Cell, ...]
    steps: dict[str, dict[str, Any]]

    @property
    def complete(self) -> bool:
        """Whether every trial is there, and every step has been timed."""
        wanted = sum(len(task.arms) for task in self.config.tasks) * len(self.config.seeds)
        return sum(len(cell.final) for cell in self.cells) == wanted and len(self.steps) == len(self.config.tasks)

    @cached_property
    def _by_name(self) -> dict[tuple[str, Arm], Cell]:
        return {(cell.task, cell.arm): cell for cell in self.cells}

    def cell(self, task: str, arm: Arm) -> Cell | None:
        """The cell of an arm, if any of its trials is there."""
        return self._by_name.get((task, arm))

    def title(self, task: str) -> str:
        """What the data of a task is called."""
        return str(self.steps[task]["title"]) if task in self.steps else self.config.task(task).title

    def seconds_per_step(self, task: str, arm: Arm) -> float | None:
        """The time of a training step, where it has been measured."""
        return self.steps[task]["seconds_per_step"][arm.name] if task in self.steps else None

    @classmethod
    def collect(cls, folder: StudyFolder) -> StudyResult:
        """All that is there by now in the folder of a study."""
        config = folder.config()
        cells = []
        for task in config.tasks:
            for arm in task.arms:
                trials = [Trial(task.name, arm, seed) for seed in config.seeds]
                records = {trial.seed: folder.record(trial) for trial in trials if folder.has(trial)}
                if records:
                    cells.append(_cell(task.name, arm, records))
        # Read back, so that tables and plots show what the file says, to the last digit.
        return cls.from_json(json.loads(cls(config, tuple(cells), folder.steps()).to_text()))

    def to_text(self) -> str:
        """The result as JSON, a line for each cell: a thousand numbers in one line are easier to leave alone."""
        cells = [json.dumps(five_digits(asdict(cell))) for cell in self.cells]
        head = {"format": FORMAT_VERSION, "complete": self.complete, "config": self.config.to_json()}
        text = json.dumps(head | {"steps": five_digits(self.steps)}, indent=1)[:-2]
        return text + ',\n "cells": [\n  ' + ",\n  ".join(cells) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StudyResult:
        """The result whose `to_text` was read. Raises `ValueError` for another format."""
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"expected a topology.json of format {FORMAT_VERSION}, got {values.get('format')!r}")

        def cell(entry: dict[str, Any]) -> Cell:
            by_seed = {name: {int(seed): v for seed, v in entry[name].items()} for name in ("final", "curves")}
            return Cell(**entry | by_seed | {"arm": Arm(**entry["arm"])})

        return cls(StudyConfig.from_json(values["config"]), tuple(map(cell, values["cells"])), values["steps"])


def _cell(task: str, arm: Arm, records: dict[int, dict[str, Any]]) -> Cell:
    first, *others = records.values()
    same = ("learning_rate", "parameters", "stored_bytes")
    if any(other[name] != first[name] for other in others for name in same):
        raise RunError(
            f"expected one learning rate and size in the trials of {task}, {arm.name}, got different ones, as from "
            "different machines; remove their files in trials, and they are made again"
        )
    moved = [record["topology"]["moved_share"] for record in records.values() if record["topology"]]
    last = {seed: record["curve"][-1] for seed, record in records.items()}
    return Cell(
        task=task,
        arm=arm,
        learning_rate=first["learning_rate"],
        parameters=first["parameters"],
        stored_bytes=first["stored_bytes"],
        training_bytes=max(record["training_bytes"] for record in records.values()),
        moved_share=statistics.mean(moved) if moved else None,
        updates=first["topology"].get("updates", 0),
        final={seed: point["loss"] if point["accuracy"] is None else point["accuracy"] for seed, point in last.items()},
        curves={seed: [[p[name] for name in CURVE] for p in record["curve"]] for seed, record in records.items()},
    )
