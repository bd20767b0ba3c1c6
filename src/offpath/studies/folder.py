"""A run's folder: `config.json`, `metrics.jsonl`, `checkpoint.safetensors`, locked while a process works in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offpath.studies.checkpoint import load_checkpoint, read_config, save_checkpoint
from offpath.studies.config import RunConfig, RunError
from offpath.studies.files import write_text
from offpath.studies.run import Run


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

    def start(self, config: RunConfig) -> None:
        """Begin a new run here. Raises `RunError` when the folder already holds one: nothing is overwritten."""
        if self.config_file.exists():
            raise RunError(f"{self.path} already holds a run; go on with it by --resume, or choose another --out")
        write_text(self.metrics_file, "")
        write_text(self.config_file, json.dumps(config.to_json(), indent=2) + "\n")

    def resumed_config(self, epochs: int | None = None) -> RunConfig:
        """The config of the run that is here, with its number of epochs raised when `epochs` says so."""
        config = read_config(self.path)
        if epochs is None or epochs == config.epochs:
            return config
        if epochs < config.epochs:
            raise RunError(f"expected at least the {config.epochs} epochs that the run was started with, got {epochs}")
        config = replace(config, epochs=epochs)
        write_text(self.config_file, json.dumps(config.to_json(), indent=2) + "\n")
        return config

    def restore(self, run: Run) -> None:
        """Put `run` at the folder's checkpoint, and drop the metrics of epochs that it does not contain.

        A run that was stopped before its first checkpoint starts from the beginning.
        """
        if self.checkpoint_file.exists():
            load_checkpoint(run, self.checkpoint_file)
        kept = [record for record in self.metrics() if record["step"] <= run.step]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def save(self, run: Run) -> None:
        """Write the checkpoint."""
        save_checkpoint(run, self.checkpoint_file)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics. Raises `RunError` when it cannot be written."""
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"expected to write {self.metrics_file}, got: {error}; free space") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records written so far; a last line that was cut off is not one."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records
