"""`offpath study topology`: from a fresh folder, killed and gone on with, and what it says of what came out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run_offpath
from offpath.studies import RunError
from offpath.studies.data import DataError, DataNotFoundError
from offpath.studies.topology import StudyConfig, StudyResult, study
from offpath.studies.topology.config import FULL, MEAN_METHODS, METHODS, QUICK, Arm, TaskConfig, Trial
from offpath.studies.topology.folder import StudyFolder
from offpath.studies.topology.result import Cell, Difference
from offpath.studies.topology.tables import tables
from offpath.studies.topology.task import MATCH_TOLERANCE, Task, open_task, parameter_count
from offpath.studies.topology.text import Text
from offpath.studies.topology.trial import Training, run_trial, schedule

WAIT_SECONDS = 120
COMMAND = [sys.executable, "-c", "from offpath_cli import main; main()", "study", "topology", "--quick", "--jobs", "1"]
# One thread: the equal bits that this asks for, and no waiting for threads that a busy machine does not run.
SETTINGS = {"COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


RECORD: dict[str, Any] = dict.fromkeys(("learning_rate", "parameters", "stored_bytes", "training_bytes"), 1)
RECORD |= {"topology": {}, "curve": [{}]}

pytestmark = pytest.mark.usefixtures("one_thread")


class Watcher:
    """Watches nothing."""

    def on_timing(self, task: str, turns: int) -> None:
        pass

    def on_turn(self) -> None:
        pass

    def on_trials(self, finished: int, total: int, running: Mapping[str, float]) -> None:
        pass


def _trials(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "trials").glob("*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quick study, run once from a fresh folder by the command, and what that printed."""
    out = tmp_path_factory.mktemp("study") / "quick"
    ran = subprocess.run(
        [*COMMAND, "--out", str(out)], env=os.environ | SETTINGS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return out, ran.stdout


@pytest.fixture(scope="module")
def quick_tasks() -> dict[str, Task]:
    return {config.name: open_task(config, None) for config in QUICK.tasks}


def test_quick_study_is_whole(finished: tuple[Path, str]) -> None:
    out, printed = finished
    result = StudyResult.from_json(json.loads((out / "topology.json").read_text()))
    assert result.complete and result.config == QUICK
    assert {cell.arm.method for cell in result.cells if cell.task == "digits"} == {*METHODS, *MEAN_METHODS}
    assert all(set(cell.final) == {0, 1} for cell in result.cells)
    assert all(entry > 0 for steps in result.steps.values() for entry in steps["seconds_per_step"].values())
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "src=" not in page and "Incomplete" not in page
    assert (out / "images.svg").read_text() in page and (out / "text.svg").read_text() in page
    for text in ("90% RigL", "80% small dense", "SET minus static", "held-out loss"):
        assert text in printed and text in page


def test_killed_study_goes_on_to_the_same_numbers(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole, out = _trials(finished[0]), tmp_path / "killed"
    out.mkdir()
    shutil.copy(finished[0] / "steps.json", out)  # times would differ, and take their time
    started = subprocess.Popen([*COMMAND, "--out", str(out)], env=os.environ | SETTINGS, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (out / "trials").exists() or len(_trials(out)) < len(whole) // 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.kill()
    started.wait()
    left = _trials(out)
    assert left and all(whole[name] == text for name, text in left.items())
    ran = subprocess.run(
        [*COMMAND, "--out", str(out)], env=os.environ | SETTINGS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert _trials(out) == whole
    assert (out / "topology.json").read_text() == (finished[0] / "topology.json").read_text()


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(finished: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(finished[0], out)
    kept = ["tune_digits_dense_0.01.json", "digits_dense_seed0.json", "digits_static-0.9_seed1.json"]
    for path in (out / "trials").iterdir():
        if path.name not in kept:
            path.unlink()

    class Impatient(Watcher):
        def on_trials(self, finished: int, total: int, running: Mapping[str, float]) -> None:
            signal.raise_signal(signal.SIGINT)

    result = study(QUICK, out, {}, 1, Impatient())
    assert not result.complete and {*kept} <= {path.name for path in (out / "trials").iterdir()}
    dense = result.cell("digits", Arm("dense"))
    assert dense is not None and 0 in dense.final
    assert [table.title for table in tables(result)]  # of whatever is there


@pytest.mark.parametrize("name", ["digits", "text"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.98])
def test_small_dense_net_has_as_many_parameters(quick_tasks: dict[str, Task], name: str, sparsity: float) -> None:
    full_sizes = {"digits": FULL.tasks[0].sizes, "text": FULL.tasks[2].sizes}[name]
    task = quick_tasks[name]
    task.config = replace(task.config, sizes=full_sizes)
    small, sparse = (task.model(Arm(method, sparsity), 0) for method in ("small-dense", "static"))
    assert abs(parameter_count(small) / parameter_count(sparse) - 1) <= MATCH_TOLERANCE == 0.01
    assert parameter_count(small) == task.dense_parameters(task.matched_sizes(sparsity))


def test_net_that_cannot_be_matched_is_refused(quick_tasks: dict[str, Task]) -> None:
    task = quick_tasks["digits"]
    task.config = replace(task.config, sizes=(2, 2))
    with pytest.raises(ValueError, match="expected a dense net of about"):
        task.matched_sizes(0.5)


def test_fixed_and_moving_arms_start_with_the_same_net() -> None:
    task = open_task(QUICK.tasks[0], None)
    trainings = {m: Training(task, Arm(m, 0.9), 3, 100, 1e-3) for m in ("static", "set", "rigl")}
    states = {method: training.model.state_dict() for method, training in trainings.items()}
    for name, tensor in states["static"].items():
        assert all(torch.equal(tensor, state[name]) for state in states.values())
    gmp, dense = (Training(task, Arm(m, s), 3, 100, 1e-3).model for m, s in (("gmp", 0.9), ("dense", 0.0)))
    assert torch.equal(gmp[0].to_dense().weight, dense[0].weight)


def test_arms_end_where_they_should() -> None:
    task = open_task(QUICK.tasks[0], None)
    for arm in task.config.arms:
        record = run_trial(task, Trial("digits", arm, 0), 1e-2, lambda done, total: None)
        assert record["curve"][-1]["step"] == task.config.steps
        if arm.method in ("set", "rigl", "gmp"):
            assert abs(record["topology"]["sparsity"] - arm.sparsity) < 1e-3 and record["topology"]["updates"] > 0


def test_a_step_follows_from_seed_and_number_alone_and_tuning_sees_no_test_data(quick_tasks: dict[str, Task]) -> None:
    for task in quick_tasks.values():
        forward = [task.batch(0, step, False) for step in range(5)]
        again = {step: task.batch(0, step, False) for step in (4, 1, 3)}
        assert all(torch.equal(forward[step][0], batch[0]) for step, batch in again.items())
        assert not torch.equal(forward[0][0], task.batch(1, 0, False)[0])
    images = quick_tasks["digits"]
    kept, held_back = set(images._kept.tolist()), set(images._held_back.tolist())
    assert not kept & held_back and len(kept | held_back) == len(images.dataset.train_labels)
    text = quick_tasks["text"]
    (train, test), (tune, held) = text._parts[False], text._parts[True]
    assert torch.equal(torch.cat([tune, held]), train) and len(held) == len(test)


def test_images_are_mirrored_from_left_to_right_or_left_alone() -> None:
    images = open_task(QUICK.tasks[0], None)
    batch, labels = images.batch(0, 0, False)
    known = {tuple(row.tolist()) for row in images.dataset.train_images}
    height, width = images.dataset.image_shape
    mirrored = batch.view(-1, height, width).flip(2).reshape(len(batch), -1)
    same = [tuple(row.tolist()) in known for row in batch]
    assert 0 < sum(same) < len(batch) == len(labels)
    assert all(as_is or tuple(row.tolist()) in known for as_is, row in zip(same, mirrored, strict=True))


def test_diverging_rate_loses_the_tuning_and_stops_a_trial() -> None:
    config = replace(QUICK.tasks[0], learning_rates=(1e-2, 1e30))
    task = open_task(config, None)
    record = run_trial(task, Trial("digits", Arm("dense"), 0, 1e30), 1e30, lambda done, total: None)
    assert record["curve"][-1]["loss"] is None
    with pytest.raises(RunError, match=r"expected a finite loss, got \w+ at step \d+ of digits_dense_seed0"):
        run_trial(task, Trial("digits", Arm("dense"), 0), 1e30, lambda done, total: None)


def test_learning_rate_is_the_best_of_those_tried(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    folder.settle(QUICK)
    accuracies = {1e-3: 0.5, 1e-2: 0.6}
    for trial in QUICK.tuning():
        assert folder.learning_rate(QUICK, "text", Arm("rigl", 0.8)) is None
        point = {"loss": trial.tuning_rate, "accuracy": accuracies.get(trial.tuning_rate)}
        folder.write(trial, RECORD | {"curve": [point]})
        if trial.task == "text" and trial.arm == Arm("static", 0.8):
            break
    assert folder.learning_rate(QUICK, "digits", Arm("gmp", 0.9)) == 1e-2
    with pytest.raises(RunError, match=r"a learning rate that gives text, dense a finite loss|found none"):
        for trial in QUICK.tuning():
            folder.write(trial, RECORD | {"curve": [{"loss": None, "accuracy": None}]})
        folder.learning_rate(QUICK, "text", Arm("dense"))


def test_folder_of_another_study_is_refused_and_left_alone(finished: tuple[Path, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"expected this study in .*choose another --out"):
        study(replace(QUICK, seeds=(0, 1, 2)), finished[0], {}, 1, Watcher())
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file()} == before


def test_bad_requests_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two different seeds or more"):
        StudyConfig(QUICK.tasks, (1, 1))
    with pytest.raises(RunError, match="at least one process"):
        study(QUICK, tmp_path / "a", {}, 0, Watcher())
    with pytest.raises(RunError, match=r"expected --data for cifar10, fashion-mnist, tinyshakespeare, got 'cifar'"):
        study(FULL, tmp_path / "a", {"cifar": "x"}, 1, Watcher())
    with pytest.raises(RunError, match="expected no --data for digits, which comes inside a Python package"):
        study(QUICK, tmp_path / "a", {"digits": "x"}, 1, Watcher())
    with pytest.raises(RunError, match=r"found nothing there; correct --data cifar10=PATH"):
        study(FULL, tmp_path / "a", {"cifar10": str(tmp_path / "nowhere")}, 1, Watcher())
    with pytest.raises(DataError, match="fashion-mnist"):
        study(FULL, tmp_path / "b", {"fashion-mnist": str(tmp_path)}, 1, Watcher())
    assert not (tmp_path / "a").exists()
    (tmp_path / "report.html").touch()
    with pytest.raises(RunError, match="holds the report of another; choose another --out"):
        study(QUICK, tmp_path, {}, 1, Watcher())
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(RunError, match="if another study was started there, choose another --out"):
        study(QUICK, tmp_path, {}, 1, Watcher())
    (tmp_path / "broken" / "trials").mkdir(parents=True)
    (tmp_path / "broken" / "study.json").write_text("{")
    with pytest.raises(RunError, match=r"expected a readable .*study\.json"):
        study(QUICK, tmp_path / "broken", {}, 1, Watcher())


def test_texts_that_are_none(tmp_path: Path) -> None:
    config: TaskConfig = FULL.task("shakespeare")
    with pytest.raises(DataNotFoundError, match="--data tinyshakespeare=FILE"):
        Text(config, None)
    with pytest.raises(DataError, match=r"a text in .*missing"):
        Text(config, tmp_path / "missing")
    (tmp_path / "short").write_text("to be or not to be")
    with pytest.raises(DataError, match="a text of more than 660 characters; got 18"):
        Text(config, tmp_path / "short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a text in .*binary"):
        Text(config, tmp_path / "binary")


def test_command_refuses_data_without_a_name(tmp_path: Path) -> None:
    ran = run_offpath("study", "topology", "--quick", "--data", "cifar10", "--out", tmp_path / "x")
    assert ran.exit_code == 1 and ran.stderr.startswith("error: expected --data NAME=PATH")


def test_difference_is_taken_seed_by_seed() -> None:
    def cell(values: dict[int, float]) -> Cell:
        return Cell("t", Arm("static", 0.9), 1e-3, 1, 4, 16, None, 0, values, {})

    found = Difference.between(cell({0: 3.0, 1: 5.0, 2: 7.0, 9: 100.0}), cell({2: 5.0, 1: 4.0, 0: 2.0}))
    assert found is not None and found.seeds == 3 and found.mean == pytest.approx(4 / 3)
    # Differences 1, 1, 2: deviation 1 / sqrt(3), over sqrt(3) seeds, times Student's t of two degrees of freedom.
    assert found.half_width == pytest.approx(4.303 / 3) and not found.separates
    assert Difference.between(cell({0: 1.0}), cell({0: 2.0})) is None


def test_schedule_rises_and_falls() -> None:
    values = [schedule(step, 200) for step in range(200)]
    assert max(values) == values[9] and values[0] < 0.2 and values[-1] < 1e-3
    assert values[10:] == sorted(values[10:], reverse=True)


def test_records_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    folder.settle(QUICK)
    trial = next(iter(QUICK.trials()))
    folder.write(trial, RECORD)
    assert folder.record(trial) == RECORD
    for broken in ({}, [], RECORD | {"curve": []}, RECORD | {"curve": None}):
        folder.write(trial, broken)
        with pytest.raises(RunError, match=rf"expected .* in .*{trial.name}\.json; remove it, and it is made again"):
            folder.record(trial)
    for broken in ("[]", '{"digits": []}', '{"digits": {"title": "x"}}'):
        folder.steps_file.write_text(broken)
        with pytest.raises(RunError, match=r"expected .* in .*steps\.json; remove it"):
            folder.steps()
