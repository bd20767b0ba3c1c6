"""The whole study: the times of the steps first, while nothing else runs, then the trials in processes of their own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from offpath.cost import this_machine
from offpath.cost.timing import TimingStopped
from offpath.studies.config import RunError
from offpath.studies.data import DATASETS, WheelSpec
from offpath.studies.files import write_text
from offpath.studies.interrupt import StopRequest, stop_on_signal
from offpath.studies.ranks import expect_one_process
from offpath.studies.topology.config import StudyConfig
from offpath.studies.topology.folder import StudyFolder
from offpath.studies.topology.result import StudyResult
from offpath.studies.topology.steps import measure_steps, turns
from offpath.studies.topology.task import open_task

LOOK_SECONDS = 0.3


class StudyObserver(Protocol):
    """Whoever watches a study."""

    def on_timing(self, task: str, turns: int) -> None:
        """Called before the steps of a task are timed, in so many turns."""

    def on_turn(self) -> None:
        """Called after each turn of the timing."""

    def on_trials(self, finished: int, total: int, running: Mapping[str, float]) -> None:
        """Called every now and then while trials run; `running` says how far those in hand are, from 0 to 1."""


def study(config: StudyConfig, out: Path, data: dict[str, str], jobs: int, observer: StudyObserver) -> StudyResult:
    """Run what is left of `config` in the folder `out`, in `jobs` processes, and return all that is there then.

    `data` says where data sets are, by their names. Ctrl-C, and even a kill, lose the trials in hand and no more: the
    same call goes on. Raises `RunError` or `DataError`.
    """
    expect_one_process("a study, which starts its own")
    if jobs < 1:
        raise RunError(f"expected at least one process in --jobs, got {jobs}")
    known = {task.data for task in config.tasks}
    if unknown := sorted(data.keys() - known):
        raise RunError(f"expected --data for {', '.join(sorted(known))}, got {unknown[0]!r}")
    if idle := sorted(name for name in data if isinstance(DATASETS.get(name), WheelSpec)):
        raise RunError(f"expected no --data for {idle[0]}, which comes inside a Python package; leave it out")
    for name, path in data.items():
        if not Path(path).exists():
            raise RunError(f"expected the data set {name} at {path}, found nothing there; correct --data {name}=PATH")
    folder = StudyFolder(out)
    folder.settle(config)
    with stop_on_signal() as stop:
        _time_steps(folder, config, data, observer, stop)
        if not stop.made:
            _run_trials(folder, config, data, jobs, observer, stop)
    result = StudyResult.collect(folder)
    write_text(out / "topology.json", result.to_text())
    return result


def _time_steps(
    folder: StudyFolder, config: StudyConfig, data: dict[str, str], observer: StudyObserver, stop: StopRequest
) -> None:
    """Measure what has not been measured yet; it opens every data set, so that one that is missing shows now."""
    for task_config in config.tasks:
        measured = folder.steps()
        if stop.made or task_config.name in measured:
            continue
        path = data.get(task_config.data)
        task = open_task(task_config, Path(path) if path else None)
        observer.on_timing(task.title, turns(task_config))

        def turn() -> None:
            observer.on_turn()
            if stop.made:
                raise TimingStopped

        try:
            seconds = measure_steps(task, turn)
        except TimingStopped:
            return
        entry = {"title": task.title, "seconds_per_step": seconds, "machine": asdict(this_machine())}
        with FileLock(folder.steps_file.with_name(".steps.lock")):  # other processes write down other tasks
            write_text(folder.steps_file, json.dumps(folder.steps() | {task_config.name: entry}, indent=1) + "\n")


def _run_trials(
    folder: StudyFolder,
    config: StudyConfig,
    data: dict[str, str],
    jobs: int,
    observer: StudyObserver,
    stop: StopRequest,
) -> None:
    total = len(list(config.tuning())) + len(list(config.trials()))
    told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    running: dict[str, float] = {}
    workers = [_start_worker(folder, data) for _ in range(min(jobs, len(folder.left(config))))]
    readers = [_start_reader(worker, told) for worker in workers]
    try:
        while not stop.made and any(worker.poll() is None for worker in workers):
            _listen(told, running)
            observer.on_trials(total - len(folder.left(config)), total, running)
            for worker in workers:
                if worker.poll() not in (None, 0):
                    _listen(told, running)
                    raise RunError(
                        f"a process of the study ended with status {worker.returncode}; start again to go on"
                    )
        _listen(told, running)
        observer.on_trials(total - len(folder.left(config)), total, running)
    finally:
        for worker in workers:
            worker.kill()  # files are written whole or not at all
            worker.wait()
        for reader in readers:
            reader.join()


def _start_worker(folder: StudyFolder, data: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offpath.studies.topology.worker", str(folder.path), json.dumps(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A session of its own: Ctrl-C on the terminal is for the study, which ends its workers.
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def _start_reader(worker: subprocess.Popen[str], told: queue.SimpleQueue[dict[str, Any]]) -> threading.Thread:
    def read() -> None:
        assert worker.stdout is not None
        with worker.stdout as lines:
            for line in lines:
                told.put(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader


def _listen(told: queue.SimpleQueue[dict[str, Any]], running: dict[str, float]) -> None:
    """Take in what the workers have said, waiting a moment. Raises `RunError` when one of them had to give up."""
    timeout = LOOK_SECONDS
    while True:
        try:
            said = told.get(timeout=timeout)
        except queue.Empty:
            return
        timeout = 0
        if "error" in said:
            raise RunError(said["error"])
        running[said["trial"]] = said["done"] / said["total"]
        if said["done"] == said["total"]:
            del running[said["trial"]]
