"""A process that trains whatever trials are left, until none is. Run as a module; its output says what it does."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from offpath.kernels import KernelError
from offpath.studies.config import RunError
from offpath.studies.data import DataError
from offpath.studies.topology.config import Trial
from offpath.studies.topology.folder import StudyFolder
from offpath.studies.topology.task import Task, open_task
from offpath.studies.topology.trial import run_trial

TOLD_EVERY_STEPS = 20
LOOK_AGAIN_SECONDS = 0.5
INTERRUPTED = 130


class Worker:
    """Takes one trial after the other from a study's folder; `data` says where data sets are, by their names."""

    def __init__(self, folder: StudyFolder, data: dict[str, str]) -> None:
        self.folder, self.data, self.config = folder, data, folder.config()
        self.parent = os.getppid()
        self.tasks: dict[str, Task] = {}

    def work(self) -> None:
        """Train until every trial is finished, by this process or another."""
        while left := self.folder.left(self.config):
            if not any(self._tried(trial) for trial in left):
                time.sleep(LOOK_AGAIN_SECONDS)  # others are busy with what must come first

    def _tried(self, trial: Trial) -> bool:
        rate = trial.tuning_rate or self.folder.learning_rate(self.config, trial.task, trial.arm)
        if rate is None:
            return False
        with self.folder.claimed(trial) as mine:
            if mine:
                task = self._task(trial.task)
                self.folder.write(trial, run_trial(task, trial, rate, lambda *at: self._tell(trial, *at)))
            return mine

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            config = self.config.task(name)
            path = self.data.get(config.data)
            self.tasks[name] = open_task(config, Path(path) if path else None)
        return self.tasks[name]

    def _tell(self, trial: Trial, done: int, total: int) -> None:
        if done % TOLD_EVERY_STEPS == 0 or done == total:
            if os.getppid() != self.parent:
                raise SystemExit("whoever started this has gone")
            print(json.dumps({"trial": trial.name, "done": done, "total": total}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        Worker(StudyFolder(Path(sys.argv[1])), json.loads(sys.argv[2])).work()
    except (RunError, DataError, KernelError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
