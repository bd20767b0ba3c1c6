"""Training one model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from offpath.studies.config import RunConfig
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import stop_on_signal
from offpath.studies.ranks import ALONE, Ranks
from offpath.studies.resumable import Resumable
from offpath.studies.run import Run

AnyRun = TypeVar("AnyRun", bound=Resumable)
Watched = TypeVar("Watched", bound=Resumable, contravariant=True)


class Observer(Protocol[Watched]):
    """Whoever watches a run."""

    def on_start(self, run: Watched) -> None:
        """Called once, before the first step."""

    def on_step(self, run: Watched) -> None:
        """Called after every step."""

    def on_epoch(self, run: Watched, record: dict[str, Any]) -> None:
        """Called after every epoch with its record, the one that stands in `metrics.jsonl`."""


def train(config: RunConfig, out: Path, observer: Observer[Run], resume: bool = False, ranks: Ranks = ALONE) -> bool:
    """Train `config` in the folder `out`; True when it ran to its end, False when Ctrl-C stopped it.

    A checkpoint is written after every epoch and when the run is stopped. With `resume`, the run in `out` goes on
    from its checkpoint, to the same numbers as if it had never stopped (on the same backend, ISA, number of threads and
    measured costs of the kernels; bit for bit on one thread). Of many `ranks`, each calls this with the same config,
    and the first reads and writes the folder; the same numbers come from the same number of them. Raises `RunError` or
    `DataError`.
    """
    folder = RunFolder(out)
    if resume:
        config = ranks.from_first(lambda: _settled(folder, config))
    run = Run(config, load(config.data, Path(config.data_dir) if config.data_dir else None), ranks)
    with ExitStack() as held:
        ranks.from_first(lambda: held.enter_context(folder.locked()))
        if resume:
            folder.restore(run)
        else:
            ranks.from_first(lambda: _start(folder, run.config))
        return advance_to_the_end(run, folder, observer)


def advance_to_the_end(run: AnyRun, folder: RunFolder, observer: Observer[AnyRun]) -> bool:
    """Train until `run` is done or Ctrl-C comes, and keep its locked folder up to date; True when it is done."""
    ranks = run.ranks
    observer.on_start(run)
    with stop_on_signal() as stop:
        while run.step < run.total_steps and not ranks.any(stop.made):
            run.advance()
            observer.on_step(run)
            if run.at_epoch_end:
                record = run.finish_epoch()
                if ranks.first:
                    folder.append_metrics(record)
                    folder.save(run)
                observer.on_epoch(run, record)
        if not run.at_epoch_end and ranks.first:
            folder.save(run)
        ranks.any(True)  # a process that ended earlier would make torchrun stop the one that still writes
    return run.step == run.total_steps


def _settled(folder: RunFolder, config: RunConfig) -> RunConfig:
    folder.expect_run()
    return folder.settled(config)


def _start(folder: RunFolder, config: RunConfig) -> None:
    folder.refuse_existing()
    folder.start(config)
