"""The race: both twins are measured, stop and go on together, and overwrite nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from offpath.studies import RunError, race, train
from offpath.studies.folder import RunFolder
from offpath.studies.report import write_report
from offpath.studies.tables import race_rows
from run_checks import SMALL, Watcher, assert_same, state

RACE = import_module("offpath.studies.race")  # by its full name: `offpath.studies.race` is the function


@pytest.fixture(scope="module", autouse=True)
def memory_is_measured_once() -> Iterator[None]:
    """For each run, in the process of its own that takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RACE, "training_memory", cache(RACE.training_memory))
        yield


def test_race_measures_both_twins_and_writes_a_page(tmp_path: Path) -> None:
    watcher = Watcher()
    result = race(SMALL, tmp_path / "race", watcher)
    assert result is not None and len(watcher.epochs) == 3
    assert result.dense.sparsity == 0 and result.sparse.sparsity == 0.9
    hidden = 64 * 256 + 256 * 256
    others = 256 + 256 + 256 * 10 + 10
    kept = round(0.1 * 64 * 256) + round(0.1 * 256 * 256)
    assert result.dense.bytes.parameters == 4 * (hidden + others)
    assert result.sparse.bytes.parameters == 4 * (kept + others)
    assert result.sparse.bytes.gradients == result.sparse.bytes.parameters
    # Adam keeps two moments an entry and a step count (4 bytes) for each of the six parameters.
    assert result.sparse.bytes.optimizer == 2 * result.sparse.bytes.parameters + 6 * 4
    for lane in (result.dense, result.sparse):
        # What is kept was allocated while the measurement looked on. The slack is for pages that malloc_trim leaves
        # resident because a live allocation shares them: up to two for each of the kept tensors.
        assert lane.peak_memory_bytes > 0.9 * lane.bytes.total - 2**16
        assert lane.samples_per_second == pytest.approx(1437 / 23 / lane.step_seconds_median)
    assert result.step_speedup > 0
    assert json.loads((tmp_path / "race" / "race.json").read_text())["sparse"]["name"] == "sparse"
    write_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page and "http-equiv" not in page
    for row in race_rows(result):
        assert all(cell in page for cell in row)


def test_stopped_race_resumes_to_the_same_numbers(tmp_path: Path, one_thread: None) -> None:
    assert race(SMALL, tmp_path / "whole", Watcher())
    assert race(SMALL, tmp_path / "parts", Watcher(stop_after_steps=4)) is None
    assert race(SMALL, tmp_path / "parts", Watcher(), resume=True)
    for lane in ("dense", "sparse"):
        assert_same(state(tmp_path / "parts" / lane), state(tmp_path / "whole" / lane))


def test_race_killed_between_the_two_checkpoints_catches_up(tmp_path: Path, one_thread: None) -> None:
    assert race(SMALL, tmp_path / "whole", Watcher())
    assert race(replace(SMALL, epochs=1), tmp_path / "parts", Watcher())
    dense = RunFolder(tmp_path / "parts" / "dense")
    assert train(replace(SMALL, sparsity=0.0, epochs=2), dense.path, Watcher(), resume=True)
    assert race(SMALL, tmp_path / "parts", Watcher(), resume=True)
    for lane in ("dense", "sparse"):
        assert_same(state(tmp_path / "parts" / lane), state(tmp_path / "whole" / lane))


@pytest.mark.parametrize("started", ["dense", "sparse"])
def test_race_killed_while_it_started_can_be_started_again(tmp_path: Path, started: str) -> None:
    (tmp_path / "race" / started).mkdir(parents=True)
    RunFolder(tmp_path / "race" / started).start(SMALL)
    assert race(replace(SMALL, epochs=1), tmp_path / "race", Watcher(stop_after_steps=1)) is None
    assert race(replace(SMALL, epochs=1), tmp_path / "race", Watcher(), resume=True)


def test_race_does_not_overwrite_a_race_or_a_run(tmp_path: Path) -> None:
    train(replace(SMALL, epochs=1), tmp_path / "race" / "sparse", Watcher())
    with pytest.raises(RunError, match="sparse already holds a run"):
        race(SMALL, tmp_path / "race", Watcher())
    assert not (tmp_path / "race" / "dense" / "config.json").exists()


def test_race_needs_a_sparse_twin(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="above 0"):
        race(replace(SMALL, sparsity=0.0), tmp_path / "race", Watcher())


def test_a_lane_is_held_while_it_races(tmp_path: Path) -> None:
    class Intruder(Watcher):
        refused = 0

        def on_chunk(self, *args) -> None:
            super().on_chunk(*args)
            for lane in ("dense", "sparse"):
                with pytest.raises(RunError, match=f"{lane} to be free, but another process is working in it"):
                    train(SMALL, tmp_path / "race" / lane, Watcher(), resume=True)
                self.refused += 1

    watcher = Intruder(stop_after_steps=4)
    assert race(SMALL, tmp_path / "race", watcher) is None and watcher.refused
    with RunFolder(tmp_path / "race" / "dense").locked(), pytest.raises(RunError, match="dense to be free"):
        race(SMALL, tmp_path / "race", Watcher(), resume=True)


def test_one_process_races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"expected one process for a race, got 2 of torchrun; start it without"):
        race(SMALL, tmp_path / "race", Watcher())
    assert not (tmp_path / "race").exists()
