"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoint.safetensors`, locked while a process works in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from offpath.studies.checkpoint import load_checkpoint, save_checkpoint
from offpath.studies.config import RunConfig, RunError
from offpath.studies.files import refuse_other_report, write_text
from offpath.studies.resumable import Resumable

# The two runs of a race, each in a folder of its own.
LANES = ("dense", "sparse")
# Of an epoch, whatever is trained.
IN_EVERY_RECORD = {"epoch", "step", "train_seconds", "step_seconds"}


class AnyConfig(Protocol):
    """What a run is asked to do."""

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""


class RunFolder:
    """Where one run keeps its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoint_file = path / "checkpoint.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises `RunError` when it cannot be written or another holds it."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"expected a folder to write to, but {self.path} is a file; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"expected {self.path} to be free, but another process is working in it") from error
        except OSError as error:
            raise RunError(f"expected a writable folder {self.path}, got: {error}; choose another --out") from error
        try:
            yield
        finally:
            lock.release()

    def refuse_existing(self, started: bool = True) -> None:
        """Raise `RunError` when the folder already holds a run: nothing is overwritten.

        With `started` False, one that was merely started and has nothing to lose does not count.
        """
        if self.checkpoint_file.exists() or (started and self.config_file.exists()):
            raise RunError(f"{self.path} already holds a run; go on with it by --resume, or choose another --out")
        if started:
            refuse_other_report(self.path, self.config_file.name)

    def expect_run(self) -> None:
        """Raise `RunError` when the folder holds a race: one more model among its own would be no part of it."""
        if self._has_lanes and not self.metrics_file.exists():
            raise RunError(f"expected a single run in {self.path}, but it holds a race; use offpath race --resume")

    def expect_race(self) -> None:
        """Raise `RunError` when the folder holds a single run."""
        if self.config_file.exists() and not self._has_lanes:
            raise RunError(f"expected a race in {self.path}, but it holds a single run; use offpath train --resume")

    @contextmanager
    def locked_lanes(self) -> Iterator[dict[str, RunFolder]]:
        """The folders of the two runs of a race here, by name, held for this process. Raises `RunError` as `locked`."""
        with ExitStack() as held:
            lanes = self.lanes()
            for lane in lanes.values():  # each is a run by itself, which offpath train --resume would go on with
                held.enter_context(lane.locked())
            yield lanes

    def lanes(self) -> dict[str, RunFolder]:
        """The folders of the two runs of a race here, by name; made where they are not."""
        lanes = {name: RunFolder(self.path / name) for name in LANES}
        for lane in lanes.values():
            lane.path.mkdir(exist_ok=True)
        return lanes

    @property
    def _has_lanes(self) -> bool:
        return all((self.path / name).is_dir() for name in LANES)

    def start(self, config: AnyConfig) -> None:
        """Begin a new run here."""
        write_text(self.metrics_file, "")
        self.write_config(config)

    def write_config(self, config: AnyConfig) -> None:
        """Write what the run is asked to do."""
        text = json.dumps(config.to_json(), indent=2) + "\n"
        if not self.config_file.exists() or self.config_file.read_text(encoding="utf-8") != text:
            write_text(self.config_file, text)

    def config(self) -> RunConfig:
        """The config of the run that is here. Raises `RunError` when there is none or it is broken."""
        return RunConfig.from_json(self.config_values())

    def config_values(self) -> Any:
        """The config as the plain values that its file holds. Raises `RunError` when there is none or it is broken."""
        try:
            return json.loads(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(
                f"expected a run in {self.path}, but {self.config_file.name} is missing; start it without --resume"
            ) from error
        except (OSError, ValueError) as error:
            raise RunError(f"expected a readable {self.config_file}, got: {error}; restore it from a copy") from error

    def settled(self, config: RunConfig) -> RunConfig:
        """`config` as the run that is here goes on with it: a run that gets more epochs keeps its `end_step`."""
        if config.end_step is None and self.config_file.exists():
            return replace(config, end_step=self.config().end_step)
        return config

    def restore(self, run: Resumable) -> None:
        """Put `run` at the folder's checkpoint, and drop the metrics of epochs that it does not contain.

        A run whose first checkpoint was never finished starts from the beginning. Raises `RunError` when the checkpoint
        or the metrics are damaged, or when one has gone while the other is there.
        """
        if run.ranks.from_first(self._has_checkpoint):
            load_checkpoint(run, self.checkpoint_file)
        if run.step > run.total_steps:
            raise RunError(
                f"expected at most {run.total_steps} steps, as the run is asked for, but the checkpoint in {self.path} "
                f"has {run.step}; go on with more --epochs"
            )
        run.ranks.from_first(lambda: self._keep_up_to(run))

    def _has_checkpoint(self) -> bool:
        records, exists = self.metrics(), self.checkpoint_file.exists()
        # The record of an epoch is written first: that of the first one stands alone when its checkpoint was cut off.
        if len(records) > 1 and not exists:
            raise RunError(
                f"expected a checkpoint beside the metrics of {len(records)} epochs in {self.path}, found none; "
                "restore it from a copy, or start again with another --out"
            )
        return exists

    def _keep_up_to(self, run: Resumable) -> None:
        kept = [record for record in self.metrics() if record["step"] <= run.step]
        steps = range(run.steps_per_epoch, run.step + 1, run.steps_per_epoch)
        for epoch, (step, record) in enumerate(zip_longest(steps, kept), start=1):
            found = record and record["step"]
            if found != step:
                raise RunError(
                    f"expected the record of epoch {epoch} in line {epoch} of {self.metrics_file}, as the checkpoint "
                    f"holds {len(steps)} epochs, got {'that of step ' + str(found) if record else 'none'}; restore the "
                    "file from a copy, or start again with another --out"
                )
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        self.write_config(run.config)

    def save(self, run: Resumable) -> None:
        """Write the checkpoint."""
        save_checkpoint(run, self.checkpoint_file)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics. Raises `RunError` when it cannot be written."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint, which is never ahead of the metrics
        except OSError as error:
            raise RunError(f"expected to write {self.metrics_file}, got: {error}; free space") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records written so far; a last line that a kill cut off is not one.

        Raises `RunError` for a broken line before the last.
        """
        if not self.metrics_file.exists():
            return []
        try:
            lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise RunError(f"expected a readable {self.metrics_file}, got: {error}; restore it from a copy") from error
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and record.keys() >= IN_EVERY_RECORD and isinstance(record["step"], int):
                records.append(record)
            elif number < len(lines):
                raise RunError(f"expected a record in line {number} of {self.metrics_file}, got {line[:60]!r}; mend it")
        return records
