"""The folder of the study of topologies: every finished trial is a file in `trials`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offpath.studies import study_folder
from offpath.studies.config import RunError
from offpath.studies.files import check_keys, read_json, write_text
from offpath.studies.topology.config import Arm, StudyConfig, Trial

IN_EVERY_RECORD = frozenset({"learning_rate", "parameters", "stored_bytes", "training_bytes", "topology", "curve"})
IN_TIMED_STEPS = frozenset({"title", "seconds_per_step"})
NEXT_STEP = "remove it, and it is made again"


class StudyFolder(study_folder.StudyFolder[StudyConfig]):
    """Where one study keeps its files. Any number of processes may work on it: a trial belongs to who locks it."""

    config_type = StudyConfig
    folders = ("trials",)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.steps_file = path / "steps.json"
        self.trials = path / "trials"

    def steps(self) -> dict[str, Any]:
        """Of each task whose steps have been timed: title, machine and seconds. Raises `RunError` for a broken file."""
        steps = read_json(self.steps_file) if self.steps_file.exists() else {}
        for timed in steps.values():
            check_keys(timed, IN_TIMED_STEPS, self.steps_file, NEXT_STEP)
        return steps

    def left(self, config: StudyConfig) -> list[Trial]:
        """The trials that are not finished yet, in the order in which they are to be run."""
        return [trial for trial in (*config.tuning(), *config.trials()) if not self.has(trial)]

    def has(self, trial: Trial) -> bool:
        """Whether the trial has been finished."""
        return self._file(trial).exists()

    def record(self, trial: Trial) -> dict[str, Any]:
        """What came out of a finished trial. Raises `RunError` when its file is broken."""
        record = read_json(self._file(trial), IN_EVERY_RECORD)
        if not isinstance(record["curve"], list) or not record["curve"]:
            raise RunError(f"expected the points of a curve in {self._file(trial)}; {NEXT_STEP}")
        return record

    def write(self, trial: Trial, record: dict[str, Any]) -> None:
        """Keep what came out of a trial."""
        write_text(self._file(trial), json.dumps(record, indent=1) + "\n")

    @contextmanager
    def claimed(self, trial: Trial) -> Iterator[bool]:
        """Whether the trial is this process's to run: nobody else has it in hand, or has finished it."""
        locks = self.path / ".locks"
        locks.mkdir(exist_ok=True)
        lock = FileLock(locks / trial.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.has(trial)
        finally:
            lock.release()

    def learning_rate(self, config: StudyConfig, task: str, arm: Arm) -> float | None:
        """The learning rate that did best on the held-back data; None before all of them have been tried.

        Best is what counts in the end: accuracy, or of a text the loss. Raises `RunError` when none gave a finite loss.
        """
        scores: dict[float, float] = {}
        for trial in config.tuning():
            if (trial.task, trial.arm) == (task, arm.tuned_as):
                if not self.has(trial):
                    return None
                assert trial.tuning_rate is not None
                last = self.record(trial)["curve"][-1]
                if last["loss"] is not None:
                    scores[trial.tuning_rate] = -last["loss"] if last["accuracy"] is None else last["accuracy"]
        if not scores:
            raise RunError(f"expected a learning rate that gives {task}, {arm.name} a finite loss, found none")
        return max(scores, key=lambda rate: scores[rate])

    def _file(self, trial: Trial) -> Path:
        return self.trials / f"{trial.name}.json"
