"""Training one autoencoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import stop_on_signal
from offpath.studies.ranks import expect_one_process
from offpath.studies.sae.activations import Activations, load
from offpath.studies.sae.config import SaeConfig
from offpath.studies.sae.run import SaeRun
from offpath.studies.train import Observer, advance_to_the_end


class TakingObserver(Protocol):
    """Whoever watches how activations are taken."""

    def on_shard(self, done: int, total: int) -> None:
        """Called before each part of the text that is read, with how many of all are done."""


class SaeObserver(TakingObserver, Observer[SaeRun], Protocol):
    """Whoever watches a run of an autoencoder."""


def train(config: SaeConfig, out: Path, observer: SaeObserver, resume: bool = False) -> bool:
    """Train `config` in the folder `out`; True when it ran to its end, False when Ctrl-C stopped it.

    The activations are taken first, where the cache has none. With `resume`, the run in `out` goes on, to the same
    numbers as if it had never stopped. Raises `RunError` or `DataError`.
    """
    expect_one_process("the training of an autoencoder")
    folder = RunFolder(out)
    if resume:
        folder.expect_run()
    with folder.locked():
        if not resume:
            folder.refuse_existing()
        config = pinned(config, folder)
        data = taken(config, observer)
        if not resume and data is None:
            folder.start(config)  # nothing has been trained, but --resume finds what was asked for
        if data is None:
            return False
        config = replace(config, text_sha256=data.text_sha256)
        run = SaeRun(config, data)
        if resume:
            folder.restore(run)
        else:
            folder.start(config)
        return advance_to_the_end(run, folder, observer)


def pinned(config: SaeConfig, folder: RunFolder) -> SaeConfig:
    """`config` with the text that the run in `folder` was started on, where that is known."""
    if not folder.config_file.exists():
        return config
    return replace(config, text_sha256=SaeConfig.from_json(folder.config_values()).text_sha256)


def taken(config: SaeConfig, observer: TakingObserver) -> Activations | None:
    """The activations of `config`; None where Ctrl-C stopped them from being taken. What was taken is kept."""
    with stop_on_signal() as stop:
        data = load(config, observer.on_shard, stop)
    return None if stop.made else data
