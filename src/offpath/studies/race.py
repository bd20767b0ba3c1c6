"""A dense model and its sparse twin, trained side by side on the same data in the same order."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from offpath.cost import TrainingBytes, this_machine
from offpath.studies.config import RunConfig, RunError
from offpath.studies.data import load
from offpath.studies.files import write_text
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import StopRequest, stop_on_signal
from offpath.studies.memory import training_memory
from offpath.studies.ranks import expect_one_process
from offpath.studies.resumable import Resumable
from offpath.studies.run import Run

# The twins take turns in short chunks: whatever disturbs the machine then hits both.
CHUNK_STEPS = 8
# The first epoch's steps carry one-time costs (first touch of memory, the transpose of a pattern).
WARM_UP_EPOCHS = 1


@dataclass(frozen=True)
class Lane:
    """What one of the twins reached and cost."""

    name: str
    sparsity: float
    test_accuracy: float
    best_test_accuracy: float
    step_seconds_median: float
    step_seconds_quartiles: tuple[float, float]
    samples_per_second: float
    train_seconds: float
    bytes: TrainingBytes
    peak_memory_bytes: int
    epochs: list[dict[str, Any]]


@dataclass(frozen=True)
class RaceResult:
    """The two lanes, the config of the sparse one, and the machine."""

    dense: Lane
    sparse: Lane
    config: dict[str, Any]
    machine: dict[str, Any]
    data_source: str

    @property
    def step_speedup(self) -> float:
        """Median dense step over median sparse step."""
        return self.dense.step_seconds_median / self.sparse.step_seconds_median

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self) | {"step_speedup": self.step_speedup}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RaceResult:
        """The result that `to_json` gave."""
        lanes = {}
        for name in ("dense", "sparse"):
            lane = values[name]
            quartiles = tuple(lane["step_seconds_quartiles"])
            lanes[name] = Lane(**lane | {"bytes": TrainingBytes(**lane["bytes"]), "step_seconds_quartiles": quartiles})
        return cls(**lanes, config=values["config"], machine=values["machine"], data_source=values["data_source"])


Racing = TypeVar("Racing", bound=Resumable)
Measured = TypeVar("Measured")


class RaceObserver(Protocol[Racing]):
    """Whoever watches a race."""

    def on_start(self, runs: dict[str, Racing]) -> None:
        """Called once, before the first step, with the runs by name (`dense`, `sparse`)."""

    def on_chunk(self, runs: dict[str, Racing]) -> None:
        """Called after each chunk of steps of both."""

    def on_epoch(self, records: dict[str, dict[str, Any]]) -> None:
        """Called when both have finished an epoch, with the record of each."""

    def on_measuring(self) -> None:
        """Called when the training is done and peak memory is about to be measured."""


def race(config: RunConfig, out: Path, observer: RaceObserver[Run], resume: bool = False) -> RaceResult | None:
    """Train the static dense twin of `config` and `config` itself in turns; None when Ctrl-C stopped them.

    `out` gets a run folder for each (`dense`, `sparse`) and, at the end, `race.json`. A stopped race goes on with
    `resume`. Raises `RunError` or `DataError`.
    """
    expect_one_process("a race")
    if config.sparsity == 0:
        raise RunError("expected a sparsity above 0 for the sparse twin, got 0")
    if config.method == "gmp":
        raise RunError("expected a twin that is sparse from the start, got method gmp; use offpath train")
    dataset = load(config.data, Path(config.data_dir) if config.data_dir else None)
    root = RunFolder(out)
    if resume:
        root.expect_race()
        config = root.settled(config)
    twins = {"dense": replace(config, sparsity=0.0, method="static", end_step=None), "sparse": config}
    with ExitStack() as held:
        held.enter_context(root.locked())
        if not resume:
            root.refuse_existing()
        runs = {name: Run(twin, dataset) for name, twin in twins.items()}
        lanes = {name: (runs[name], folder) for name, folder in held.enter_context(root.locked_lanes()).items()}
        for run, folder in lanes.values():
            if resume:
                folder.restore(run)
            else:
                folder.refuse_existing(started=False)  # a start that was cut off has left one
        for run, folder in lanes.values():
            if not resume:
                folder.start(run.config)
        config = lanes["sparse"][0].config
        root.write_config(config)
        measured = run_lanes(lanes, observer, _lane)
        if measured is None:
            return None
        result = RaceResult(*measured, config.to_json(), asdict(this_machine(config.device)), dataset.source)
        write_text(out / "race.json", json.dumps(result.to_json(), indent=1) + "\n")
        return result


def run_lanes(
    lanes: dict[str, tuple[Racing, RunFolder]],
    observer: RaceObserver[Racing],
    measure: Callable[[str, Racing, RunFolder], Measured],
) -> tuple[Measured, Measured] | None:
    """Train the two in turns, then `measure` what each reached and cost; None when Ctrl-C stopped them."""
    with stop_on_signal() as stop:
        if not take_turns(lanes, observer, stop):
            return None
        observer.on_measuring()
        with ThreadPoolExecutor() as pool:  # processes that take seconds to start, and do not disturb each other
            first, second = pool.map(lambda name: measure(name, *lanes[name]), lanes)
    return first, second


def take_turns(lanes: dict[str, tuple[Racing, RunFolder]], observer: RaceObserver[Racing], stop: StopRequest) -> bool:
    """Advance whoever is behind until all are done; False when Ctrl-C ended it."""
    runs = {name: run for name, (run, _) in lanes.items()}
    observer.on_start(runs)
    while any(run.step < run.total_steps for run in runs.values()) and not stop.made:
        behind = min(run.step for run in runs.values())
        for run, folder in lanes.values():
            if run.step == behind:
                run.advance(CHUNK_STEPS)
                if run.at_epoch_end:
                    folder.append_metrics(run.finish_epoch())
                    folder.save(run)
        observer.on_chunk(runs)
        if len({run.step for run in runs.values()}) == 1 and runs["dense"].at_epoch_end:
            observer.on_epoch({name: folder.metrics()[-1] for name, (_, folder) in lanes.items()})
    for run, folder in lanes.values():
        if not run.at_epoch_end:
            folder.save(run)
    return all(run.step == run.total_steps for run in runs.values())


def step_quartiles(epochs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the steps' seconds, after the first epoch where there are more."""
    timed = epochs[WARM_UP_EPOCHS:] or epochs
    steps = [seconds for record in timed for seconds in record["step_seconds"]]
    lower, median, upper = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
    return lower, median, upper


def epochs_of(run: Resumable, folder: RunFolder) -> list[dict[str, Any]]:
    """The records of all epochs. Raises `RunError` where some are missing."""
    epochs = folder.metrics()
    if len(epochs) != run.config.epochs:
        raise RunError(f"expected {run.config.epochs} records in {folder.metrics_file}, got {len(epochs)}; race again")
    return epochs


def _lane(name: str, run: Run, folder: RunFolder) -> Lane:
    epochs = epochs_of(run, folder)
    lower, median, upper = step_quartiles(epochs)
    memory = training_memory(run.config, torch.get_num_threads())
    return Lane(
        name=name,
        sparsity=run.config.sparsity,
        test_accuracy=epochs[-1]["test_accuracy"],
        best_test_accuracy=max(record["test_accuracy"] for record in epochs),
        step_seconds_median=median,
        step_seconds_quartiles=(lower, upper),
        samples_per_second=run.samples_per_step / median,
        train_seconds=sum(record["train_seconds"] for record in epochs),
        bytes=memory.kept,
        peak_memory_bytes=memory.peak,
        epochs=epochs,
    )
