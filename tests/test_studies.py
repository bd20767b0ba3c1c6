"""Runs: they learn, they stop and go on to the same numbers, and bad files are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from offpath import SparseLinear
from offpath.studies import RunConfig, RunError, train
from offpath.studies.checkpoint import load_checkpoint
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.run import Run
from run_checks import SMALL, Watcher, assert_same, state


@pytest.mark.parametrize("sparsity", [0.9, 0.0], ids=["sparse", "dense"])
def test_digits_are_learned_to_the_stated_accuracy(tmp_path: Path, one_thread: None, sparsity: float) -> None:
    config = RunConfig(data="digits", model="mlp", sparsity=sparsity, epochs=15, batch_size=64, seed=0)
    watcher = Watcher()
    assert train(config, tmp_path / "run", watcher)
    assert watcher.epochs[-1]["test_accuracy"] >= 0.95
    assert watcher.steps == 15 * 23


@pytest.mark.parametrize("stop_after_steps", [1, 23, 30], ids=["first step", "end of an epoch", "inside an epoch"])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, one_thread: None, stop_after_steps: int
) -> None:
    assert train(SMALL, tmp_path / "whole", Watcher())
    assert not train(SMALL, tmp_path / "parts", Watcher(stop_after_steps))
    assert RunFolder(tmp_path / "parts").checkpoint_file.exists()
    assert train(SMALL, tmp_path / "parts", Watcher(), resume=True)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_killed_run_resumes_from_its_last_checkpoint_to_the_same_numbers(tmp_path: Path, one_thread: None) -> None:
    assert train(SMALL, tmp_path / "whole", Watcher())
    assert train(replace(SMALL, epochs=2), tmp_path / "killed", Watcher())
    # As a kill would leave it: a record of an epoch that the checkpoint does not hold, and half a line.
    folder = RunFolder(tmp_path / "killed")
    folder.append_metrics(folder.metrics()[-1] | {"epoch": 3, "step": 69})
    with folder.metrics_file.open("a") as file:
        file.write('{"epoch": 4, "st')
    assert train(SMALL, folder.path, Watcher(), resume=True)
    assert_same(state(folder.path), state(tmp_path / "whole"))


def test_run_stopped_before_its_first_checkpoint_starts_again(tmp_path: Path, one_thread: None) -> None:
    assert train(SMALL, tmp_path / "whole", Watcher())
    (tmp_path / "new").mkdir()
    RunFolder(tmp_path / "new").start(SMALL)
    assert train(SMALL, tmp_path / "new", Watcher(), resume=True)
    assert_same(state(tmp_path / "new"), state(tmp_path / "whole"))


def test_finished_run_can_be_given_more_epochs(tmp_path: Path, one_thread: None) -> None:
    assert train(replace(SMALL, epochs=5), tmp_path / "five", Watcher())
    assert train(SMALL, tmp_path / "run", Watcher())
    assert train(replace(SMALL, epochs=5), tmp_path / "run", Watcher(), resume=True)
    assert_same(state(tmp_path / "run"), state(tmp_path / "five"))


def test_data_may_have_moved_when_a_run_goes_on(tmp_path: Path, one_thread: None) -> None:
    train(replace(SMALL, epochs=1, data_dir="/old"), tmp_path / "run", Watcher())
    assert train(replace(SMALL, data_dir="/new"), tmp_path / "run", Watcher(), resume=True)
    assert RunFolder(tmp_path / "run").config().data_dir == "/new"


def test_two_runs_in_one_process_do_not_disturb_each_other(one_thread: None) -> None:
    dataset = load("digits")
    alone, first, second = (Run(replace(SMALL, seed=s), dataset) for s in (1, 1, 2))
    torch.manual_seed(123)
    for _ in range(5):
        first.advance()
        second.advance(2)
        torch.rand(3)
    alone.advance(5)
    assert_same(first.model.state_dict(), alone.model.state_dict())


def test_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", Watcher())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {".lock", "config.json", "metrics.jsonl", "checkpoint.safetensors"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert RunConfig.from_json(json.loads((tmp_path / "run" / "config.json").read_text())) == SMALL


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(RunError, match="another process is working in it"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


def test_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", Watcher())
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(RunError, match="already holds a run; go on with it by --resume"):
        train(SMALL, tmp_path / "run", Watcher())
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(replace(SMALL, epochs=1), path, Watcher())
    return path


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "run"
    train(replace(SMALL, epochs=2), path, Watcher())
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: b"",
        lambda c: c[:5],
        lambda c: c[: len(c) // 2],
        lambda c: c[:-1],
        lambda c: b"\xff" * 8 + c[8:],
        lambda c: c[:20] + b"\x00" * 40 + c[60:],
        lambda c: b"not a checkpoint at all" * 10,
        lambda c: c.replace(b"offpath_run", b"offpath_nur"),
        lambda c: c.replace(b'\\"version\\": 1', b'\\"version\\": 9'),
    ],
    ids=["empty", "5 bytes", "half", "one byte short", "huge header", "zeroed", "text", "foreign", "future version"],
)
def test_damaged_checkpoint_is_refused_and_left_alone(finished_run: Path, tmp_path: Path, damage) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    checkpoint = path / "checkpoint.safetensors"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    damaged = checkpoint.read_bytes()
    with pytest.raises(RunError, match="expected"):
        train(replace(SMALL, epochs=2), path, Watcher(), resume=True)
    assert checkpoint.read_bytes() == damaged


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_anywhere_is_noticed(finished_run: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((finished_run / "checkpoint.safetensors").read_bytes())
    offset = data.draw(st.integers(0, 4000) | st.integers(0, len(content) - 1), label="offset")
    content[offset] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    run = Run(replace(SMALL, epochs=1), load("digits"))
    with pytest.raises(RunError):
        load_checkpoint(run, path)


def test_refused_resume_changes_nothing(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    (path / "checkpoint.safetensors").write_bytes(b"broken")
    before = (path / "config.json").read_bytes(), (path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError):
        train(replace(SMALL, epochs=9), path, Watcher(), resume=True)
    with RunFolder(path).locked(), pytest.raises(RunError, match="another process"):
        train(replace(SMALL, epochs=9), path, Watcher(), resume=True)
    assert ((path / "config.json").read_bytes(), (path / "metrics.jsonl").read_bytes()) == before


def test_run_killed_while_it_wrote_its_first_checkpoint_starts_again(
    finished_run: Path, tmp_path: Path, one_thread: None
) -> None:
    assert train(SMALL, tmp_path / "whole", Watcher())
    shutil.copytree(finished_run, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint.safetensors").unlink()
    assert train(SMALL, tmp_path / "killed", Watcher(), resume=True)
    assert_same(state(tmp_path / "killed"), state(tmp_path / "whole"))


def test_lost_checkpoint_is_not_passed_over_in_silence(two_epochs: Path, tmp_path: Path) -> None:
    shutil.copytree(two_epochs, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    with pytest.raises(RunError, match="expected a checkpoint beside the metrics of 2 epochs"):
        train(SMALL, tmp_path / "run", Watcher(), resume=True)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0], r"record of epoch 2 in line 2 of .*, as the checkpoint holds 2 epochs, got none"),
        ([1], "record of epoch 1 in line 1 of .* got that of step 46"),
        ([0, 0, 1], "record of epoch 2 in line 2 of .* got that of step 23"),
        ([0, 1, 1], "record of epoch 3 in line 3 of .* got that of step 46"),
        ([], "record of epoch 1 in line 1 of .* got none"),
    ],
)
def test_lost_metrics_are_not_passed_over_in_silence(
    two_epochs: Path, tmp_path: Path, kept: list[int], message: str
) -> None:
    shutil.copytree(two_epochs, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[number] for number in kept))
    before = metrics.read_text()
    with pytest.raises(RunError, match=message):
        train(SMALL, tmp_path / "run", Watcher(), resume=True)
    assert metrics.read_text() == before


def test_lost_config_does_not_let_a_new_run_overwrite_the_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    (path / "config.json").unlink()
    with pytest.raises(RunError, match="already holds a run"):
        train(SMALL, path, Watcher())


@pytest.mark.parametrize("line", [b"\xff\xfe 1\n", b'{"step": 1}\n'], ids=["no text", "no epoch"])
def test_broken_metrics_line_in_the_middle_is_refused(finished_run: Path, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(line + metrics.read_bytes())
    with pytest.raises(RunError, match="expected a record in line 1"):
        train(replace(SMALL, epochs=2), path, Watcher(), resume=True)


def test_checkpoint_of_another_run_is_refused(finished_run: Path) -> None:
    run = Run(replace(SMALL, seed=5), load("digits"))
    with pytest.raises(RunError, match="has seed=1, not 5"):
        load_checkpoint(run, finished_run / "checkpoint.safetensors")


def test_resuming_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json is missing; start it without --resume"):
        RunFolder(tmp_path).config()


BROKEN_CONFIGS = [
    "",
    "{",
    "[]",
    '{"data": "digits"}',
    *(
        json.dumps(SMALL.to_json() | change)
        for change in (
            {"epochs": "9"},
            {"learning_rate": "0.001"},
            {"seed": None},
            {"batch_size": True},
            {"data_dir": 3},
        )
    ),
]


@pytest.mark.parametrize("content", BROKEN_CONFIGS)
def test_broken_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match="expected"):
        RunFolder(tmp_path).config()


def test_full_disk_leaves_the_last_checkpoint_and_no_litter(finished_run: Path, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    before = (path / "checkpoint.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"expected to write .*checkpoint"):
            train(replace(SMALL, epochs=2), path, Watcher(), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (path / "checkpoint.safetensors").read_bytes() == before
    assert {p.name for p in path.iterdir()} == {".lock", "config.json", "metrics.jsonl", "checkpoint.safetensors"}


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another --out"):
        train(SMALL, tmp_path / "file" / "run", Watcher())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "imagenet"}, "digits, mnist-5k, mnist, fashion-mnist"),
        ({"model": "gpt"}, "mlp-small, mlp, mlp-wide"),
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity in \[0, 1\)"),
        ({"epochs": 0}, "epochs of at least 1"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"learning_rate": float("nan")}, "positive, finite learning rate"),
        ({"seed": -1}, "seed in"),
        ({"device": "tpu"}, "tpu"),
        ({"distribution": "equal"}, "uniform, erk"),
    ],
)
def test_config_that_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        replace(SMALL, **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_absent_device_is_refused() -> None:
    with pytest.raises(RunError, match="torch sees none here; offpath info says what is missing, or use --device cpu"):
        replace(SMALL, device="cuda")


def test_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a finite loss.*smaller --learning-rate"):
        train(replace(SMALL, learning_rate=1e30), tmp_path / "run", Watcher())


def test_only_the_hidden_layers_become_sparse() -> None:
    model = Run(SMALL, load("digits")).model
    assert [type(m) for m in model if not isinstance(m, nn.ReLU)] == [SparseLinear, SparseLinear, nn.Linear]
    dense = Run(replace(SMALL, sparsity=0.0), load("digits")).model
    assert not any(isinstance(m, SparseLinear) for m in dense.modules())


def test_a_model_that_its_last_step_has_spoilt_is_not_saved(tmp_path: Path) -> None:
    whole = replace(SMALL, epochs=1, batch_size=2000, learning_rate=1e38)
    with pytest.raises(RunError, match=r"expected a finite loss, got nan at step 1; .*smaller --learning-rate"):
        train(whole, tmp_path / "run", Watcher())
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
