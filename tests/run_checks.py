"""A small run, somebody who watches it, and its numbers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from offpath.studies import RunConfig
from offpath.studies.checkpoint import load_checkpoint
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.run import Run

SMALL = RunConfig(data="digits", model="mlp-small", epochs=3, batch_size=64, seed=1)


class Watcher:
    """Counts what it is told, and can ask for the end as Ctrl-C does."""

    def __init__(self, stop_after_steps: int | None = None) -> None:
        self.steps = 0
        self.epochs: list[Any] = []
        self.stop_after_steps = stop_after_steps

    def on_start(self, run: Any) -> None:
        pass

    def on_step(self, run: Any) -> None:
        self.steps += 1
        if self.steps == self.stop_after_steps:
            signal.raise_signal(signal.SIGINT)

    on_chunk = on_step

    def on_epoch(self, *records: Any) -> None:
        self.epochs.append(records[-1])

    def on_measuring(self) -> None:
        pass


def state(path: Path) -> dict[str, Any]:
    """All numbers of a run's folder but the clock's."""
    run = Run(RunFolder(path).config(), load("digits"))
    load_checkpoint(run, path / "checkpoint.safetensors")
    clock = {"train_seconds", "samples_per_second", "step_seconds"}
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": run.rng_state,
        "step": run.step,
        "metrics": [{k: v for k, v in r.items() if k not in clock} for r in RunFolder(path).metrics()],
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b
