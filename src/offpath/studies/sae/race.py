"""The same autoencoder computed densely and sparsely, trained side by side on the same samples in the same order."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from offpath.cost import TrainingBytes, this_machine
from offpath.studies.config import RunError
from offpath.studies.files import write_text
from offpath.studies.folder import RunFolder
from offpath.studies.race import RaceObserver, epochs_of, run_lanes, step_quartiles
from offpath.studies.ranks import expect_one_process
from offpath.studies.sae.config import SaeConfig
from offpath.studies.sae.memory import sae_memory
from offpath.studies.sae.run import SaeRun
from offpath.studies.sae.train import TakingObserver, pinned, taken


@dataclass(frozen=True)
class SaeLane:
    """What one of the two reached and cost."""

    name: str
    explained_variance: float
    test_l0: float
    dead: int
    step_seconds_median: float
    step_seconds_quartiles: tuple[float, float]
    tokens_per_second: float
    train_seconds: float
    bytes: TrainingBytes
    peak_memory_bytes: int
    epochs: list[dict[str, Any]]


@dataclass(frozen=True)
class SaeRaceResult:
    """The two lanes, the config of the sparse one, and the machine."""

    dense: SaeLane
    sparse: SaeLane
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


class SaeRaceObserver(TakingObserver, RaceObserver[SaeRun], Protocol):
    """Whoever watches a race of autoencoders."""


def race(config: SaeConfig, out: Path, observer: SaeRaceObserver, resume: bool = False) -> SaeRaceResult | None:
    """Train `config` computed densely and sparsely in turns; None when Ctrl-C stopped them.

    `out` gets a run folder for each (`dense`, `sparse`) and, at the end, `race.json`. A stopped race goes on with
    `resume`. Raises `RunError` or `DataError`.
    """
    expect_one_process("a race")
    if config.model != "sae":
        raise RunError(f"expected --model sae, which has a dense twin, got {config.model}; use offpath train")
    root = RunFolder(out)
    if resume:
        root.expect_race()
    with ExitStack() as held:
        held.enter_context(root.locked())
        if not resume:
            root.refuse_existing()
        config = pinned(config, root)
        data = taken(config, observer)
        if data is None:
            root.lanes()
            root.write_config(config)
            return None
        config = replace(config, text_sha256=data.text_sha256)
        runs = {dense: SaeRun(replace(config, dense=dense), data) for dense in (True, False)}
        lanes = {
            name: (runs[name == "dense"], folder) for name, folder in held.enter_context(root.locked_lanes()).items()
        }
        for run, folder in lanes.values():
            if resume and folder.config_file.exists():  # one stopped before its first step has empty folders
                folder.restore(run)
            else:
                folder.refuse_existing(started=False)
                folder.start(run.config)
        root.write_config(config)
        measured = run_lanes(lanes, observer, _lane)
        if measured is None:
            return None
        result = SaeRaceResult(*measured, config.to_json(), asdict(this_machine()), data.source)
        write_text(out / "race.json", json.dumps(result.to_json(), indent=1) + "\n")
        return result


def _lane(name: str, run: SaeRun, folder: RunFolder) -> SaeLane:
    epochs = epochs_of(run, folder)
    lower, median, upper = step_quartiles(epochs)
    memory = sae_memory(run.config)
    return SaeLane(
        name=name,
        explained_variance=epochs[-1]["explained_variance"],
        test_l0=epochs[-1]["test_l0"],
        dead=epochs[-1]["dead"],
        step_seconds_median=median,
        step_seconds_quartiles=(lower, upper),
        tokens_per_second=run.samples_per_step / median,
        train_seconds=sum(record["train_seconds"] for record in epochs),
        bytes=memory.kept,
        peak_memory_bytes=memory.peak,
        epochs=epochs,
    )
