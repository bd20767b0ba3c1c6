"""Training one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from offpath.studies.config import RunConfig
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import stop_on_signal
from offpath.studies.run import Run


class Observer(Protocol):
    """Whoever watches a run."""

    def on_start(self, run: Run) -> None:
        """Called once, before the first step."""

    def on_step(self, run: Run) -> None:
        """Called after every step."""

    def on_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """Called after every epoch with its record, the one that stands in `metrics.jsonl`."""


def train(config: RunConfig, out: Path, observer: Observer, resume: bool = False) -> bool:
    """Train `config` in the folder `out`; True when it ran to its end, False when Ctrl-C stopped it.

    A checkpoint is written after every epoch and when the run is stopped. With `resume`, the run in `out` goes on
    from its checkpoint, to the same numbers as if it had never stopped (on the same backend, ISA and number of
    threads; bit for bit on one thread). Raises `RunError` or `DataError`.
    """
    folder = RunFolder(out)
    run = Run(
        folder.settled(config) if resume else config,
        load(config.data, Path(config.data_dir) if config.data_dir else None),
    )
    with folder.locked():
        if resume:
            folder.restore(run)
        else:
            folder.refuse_existing()
            folder.start(run.config)
        observer.on_start(run)
        with stop_on_signal() as stop:
            while run.step < run.total_steps and not stop.made:
                run.advance()
                observer.on_step(run)
                if run.at_epoch_end:
                    record = run.finish_epoch()
                    folder.append_metrics(record)
                    folder.save(run)
                    observer.on_epoch(run, record)
            if not run.at_epoch_end:
                folder.save(run)
        return run.step == run.total_steps
