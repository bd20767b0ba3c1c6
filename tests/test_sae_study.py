"""`--model sae`: activations of a real transformer, runs that stop and go on, a dense twin that agrees."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import run_offpath
from offpath.studies import RunError, race as race_other, train as train_other
from offpath.studies.folder import RunFolder
from offpath.studies.sae import SaeConfig, race, train
from offpath.studies.sae.activations import Activations, load
from offpath.studies.sae.report import write_race_report, write_train_report
from offpath.studies.sae.run import SaeRun
from offpath.studies.sae.tables import race_rows
from run_checks import SMALL, Watcher, assert_same
from sae_runs import TINY, SaeWatcher, numbers


@pytest.fixture(scope="module")
def synthetic() -> Activations:
    data = load(TINY)
    assert data is not None
    return data


@pytest.mark.parametrize("model", ["sae", "sae-batch-topk", "sae-jumprelu"])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, one_thread: None, model: str) -> None:
    config = replace(TINY, model=model)
    assert train(config, tmp_path / "whole", SaeWatcher())
    assert not train(config, tmp_path / "parts", SaeWatcher(stop_after_steps=12))
    with pytest.raises(RunError, match="already holds a run"):
        train(config, tmp_path / "parts", SaeWatcher())
    assert train(config, tmp_path / "parts", SaeWatcher(), resume=True)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same(*(load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")))


def test_run_writes_what_the_other_models_write(tmp_path: Path) -> None:
    watcher = SaeWatcher()
    assert train(TINY, tmp_path / "run", watcher)
    write_train_report(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "report.html",
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 3 and "no transformer and no text was involved" in page and "src=" not in page
    first, last = watcher.epochs
    assert last["explained_variance"] == 1 - last["test_fvu"] > first["explained_variance"]
    assert last["test_l0"] == 8 and last["tokens_per_second"] > 0
    assert sum(last["frequency_histogram"]) == 128 - last["never_fired_in_test"]


def test_dense_twin_has_the_same_losses_and_gradients(synthetic: Activations) -> None:
    """In float64, where the two must agree: with dead latents, over a few steps of Adam."""
    wide = Activations(synthetic.train[:4000].double(), synthetic.test.double(), synthetic.mean.double(), "")
    torch.set_default_dtype(torch.float64)
    try:
        dense, sparse = (SaeRun(replace(TINY, batch_size=500, dense=dense), wide) for dense in (True, False))
    finally:
        torch.set_default_dtype(torch.float32)
    for run in (dense, sparse):
        run.model.tokens_since_fired[:64] = 10**6
        run.model.encoder_bias.data[:64] = -10.0
    for step in range(4):
        losses = [run.model.loss(wide.train[500 * step : 500 * step + 500]) for run in (dense, sparse)]
        assert losses[0].dead == losses[1].dead > 0
        for name in ("total", "fvu", "aux", "mse", "l0"):
            torch.testing.assert_close(*(getattr(loss, name) for loss in losses), rtol=1e-9, atol=1e-12)
        for loss, run in zip(losses, (dense, sparse), strict=True):
            run.optimizer.zero_grad()
            loss.total.backward()
        for ours, theirs in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        for run in (dense, sparse):
            run.optimizer.step()


def test_race_measures_both_and_goes_on_after_a_stop(tmp_path: Path, one_thread: None) -> None:
    config = replace(TINY, epochs=1)
    assert race(config, tmp_path / "race", SaeWatcher(stop_after_steps=1)) is None
    result = race(config, tmp_path / "race", SaeWatcher(), resume=True)
    assert result is not None and result.step_speedup > 0
    assert result.dense.explained_variance == pytest.approx(result.sparse.explained_variance, abs=0.01)
    assert result.dense.bytes == result.sparse.bytes
    parameters = 2 * 128 * 64 + 128 + 64
    assert result.sparse.bytes.parameters == 4 * parameters
    assert json.loads((tmp_path / "race" / "race.json").read_text())["sparse"]["name"] == "sparse"
    write_race_report(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 and all(cell in page for row in race_rows(result) for cell in row)


def test_race_of_an_activation_without_a_dense_twin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has a dense twin, got sae-jumprelu; use offpath train"):
        race(replace(TINY, model="sae-jumprelu"), tmp_path / "race", SaeWatcher())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "mnist-5k"}, "tinyshakespeare, python-source, synthetic"),
        ({"model": "mlp"}, "sae, sae-batch-topk, sae-jumprelu"),
        ({"k": 129}, "k from 1 to the 128 latents"),
        ({"layer": 0}, "layer of at least 1"),
        ({"epochs": 0}, "epochs of at least 1"),
        ({"batch_size": 1}, "one row has no variance"),
        ({"learning_rate": float("nan")}, "positive, finite learning rate"),
        ({"seed": -1}, "seed in"),
    ],
)
def test_config_that_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("change", [{"k": "8"}, {"dense": 1}, {"seed": True}, {"more": 1}])
def test_broken_config_is_refused(change: dict[str, Any]) -> None:
    assert SaeConfig.from_json(TINY.to_json()) == TINY
    with pytest.raises(RunError, match="expected"):
        SaeConfig.from_json(TINY.to_json() | change)


def test_batch_larger_than_the_data_is_refused(synthetic: Activations) -> None:
    with pytest.raises(RunError, match="at least a batch of samples, got 18000"):
        SaeRun(replace(TINY, batch_size=18_001), synthetic)


@pytest.mark.parametrize("model", ["sae-jumprelu", "sae-batch-topk"])
def test_more_live_latents_than_are_positive_are_refused(synthetic: Activations, model: str) -> None:
    with pytest.raises(RunError, match=r"positive pre-activations .* lower --k or raise --latents"):
        SaeRun(replace(TINY, model=model, latents=64, k=40), synthetic)


def test_quick_caps_the_epochs(tmp_path: Path) -> None:
    small = ["--model", "sae", "--data", "synthetic", "--latents", 64, "--k", 4, "--batch-size", 9000]
    assert run_offpath("train", *small, "--quick", "--epochs", 3, "--out", tmp_path / "run").exit_code == 0
    assert [record["epoch"] for record in numbers(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(("held", "asked"), [("race", "train"), ("train", "race")])
@pytest.mark.parametrize("model", ["sae", "mlp-small"])
def test_resume_tells_a_race_from_a_run(tmp_path: Path, held: str, asked: str, model: str) -> None:
    if model == "sae":
        work: Any = {"race": race, "train": train}[held]
        work(replace(TINY, batch_size=9000), tmp_path, SaeWatcher(stop_after_steps=1))
    else:
        {"race": race_other, "train": train_other}[held](SMALL, tmp_path, Watcher(stop_after_steps=1))
    before = sorted(tmp_path.rglob("*"))
    finished = run_offpath(asked, "--resume", "--out", tmp_path)
    assert finished.exit_code == 1 and f"use offpath {held} --resume" in finished.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_race_whose_activations_were_not_taken_yet_is_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["offpath.studies.sae.race"], "taken", lambda *_: None)
    assert race(TINY, tmp_path, SaeWatcher()) is None
    RunFolder(tmp_path).expect_race()
    with pytest.raises(RunError, match="it holds a race"):
        train(TINY, tmp_path, SaeWatcher(), resume=True)


def test_resume_says_when_the_model_is_of_another_kind(tmp_path: Path) -> None:
    RunFolder(tmp_path).start(TINY)
    for arguments, message in ((["mlp"], "holds an sae run, got mlp"), (["SAE"], "holds an sae run, got SAE")):
        finished = run_offpath("train", "--resume", "--out", tmp_path, "--model", *arguments)
        assert finished.exit_code == 1 and message in finished.stderr
    RunFolder(tmp_path).start(SMALL)
    finished = run_offpath("train", "--resume", "--out", tmp_path, "--model", "sae")
    assert finished.exit_code == 1 and "holds no sae run, got sae" in finished.stderr


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--model", "sae"], ["race"], ["study", "topology", "--quick"]]
)
def test_file_in_place_of_the_folder_is_refused(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("")
    data = [] if "study" in command else ["--data", "synthetic" if "sae" in command else "digits"]
    finished = run_offpath(*command, *data, "--out", tmp_path / "file")
    assert finished.exit_code == 1 and "file is a file; choose another --out" in finished.stderr


def test_diverging_run_says_so(synthetic: Activations) -> None:
    run = SaeRun(replace(TINY, learning_rate=1e30), synthetic)
    with pytest.raises(RunError, match=r"expected a finite loss.*smaller --learning-rate"):
        run.advance(9)


def test_commands(tmp_path: Path) -> None:
    small = ["--model", "sae", "--data", "synthetic", "--latents", 128, "--k", 8, "--batch-size", 2000]
    first = run_offpath("train", *small, "--epochs", 1, "--out", tmp_path / "run")
    assert first.exit_code == 0, first.stderr
    assert "sae, 8 of 128 latents, on synthetic" in first.stdout and "tokens/s" in first.stdout
    more = run_offpath("train", "--out", tmp_path / "run", "--resume", "--epochs", 2)
    assert more.exit_code == 0, more.stderr
    assert "epoch   2" in more.stdout and "epoch   1" not in more.stdout
    other = run_offpath("train", "--out", tmp_path / "run", "--resume", "--k", 9)
    assert other.exit_code == 1 and "go on with k=8 as the run was started, got 9" in other.stderr
    raced = run_offpath("race", *small, "--epochs", 1, "--out", tmp_path / "race")
    assert raced.exit_code == 0, raced.stderr
    for text in ("explained variance", "dead latents", "time a training step", "peak memory", "report.html"):
        assert text in raced.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sae", "--sparsity", "0.9"], "expected no --sparsity for an autoencoder"),
        (["--model", "mlp", "--latents", "9"], "expected --latents with one of --model sae"),
        (["--model", "sae", "--data", "mnist"], "expected data to be one of tinyshakespeare"),
        (["--model", "SAE"], "mlp-wide, sae, sae-batch-topk, sae-jumprelu, got 'SAE'"),
        (["--model", "sae", "--data", "python-source", "--data-dir", "/nonexistent"], "--data-dir with --data tinysh"),
        (["--model", "sae", "--data", "synthetic", "--data-dir", "/nonexistent"], "--data-dir with --data tinysh"),
        (["--model", "sae", "--data", "synthetic", "--layer", "7"], "expected no --layer with --data synthetic"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    finished = run_offpath("train", *arguments, "--out", tmp_path / "run")
    assert finished.exit_code == 1 and message in finished.stderr and finished.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_its_last_step_has_spoilt_is_not_saved(synthetic: Activations) -> None:
    run = SaeRun(replace(TINY, batch_size=len(synthetic.train), learning_rate=1e38), synthetic)
    run.advance()
    with pytest.raises(RunError, match="expected a finite loss, got nan at step 1"):
        run.finish_epoch()


def test_runs_alike_have_checkpoints_alike(synthetic: Activations) -> None:
    first = SaeRun(TINY, synthetic)
    torch.rand(1)
    assert torch.equal(SaeRun(TINY, synthetic).rng_state, first.rng_state)
