"""`offpath train --method`: connections move, runs stop and go on to the same numbers, the files say what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run_offpath
from offpath import SparseLinear
from offpath.studies import RunConfig, RunError, race, train
from offpath.studies.checkpoint import load_checkpoint, save_checkpoint
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.methods import end_of_updates
from offpath.studies.ranks import ALONE, Ranks
from offpath.studies.run import Run
from offpath.studies.train_report import write_report
from offpath.topology import Topology

# 23 steps an epoch, 69 in all: updates after steps 10, 20, ... 50, and that of gmp's end after 51.
SMALL = RunConfig(data="digits", model="mlp-small", epochs=3, batch_size=64, seed=1, method="rigl", update_freq=10)
MOVING = ("set", "rigl", "gmp", "mest")
CLOCK = {"train_seconds", "samples_per_second", "step_seconds"}


class Stopper:
    """Asks for the end after some steps, as Ctrl-C does."""

    def __init__(self, after_steps: int | None = None) -> None:
        self.steps, self.after_steps = 0, after_steps

    def on_start(self, run: Any) -> None:
        pass

    def on_step(self, run: Any) -> None:
        self.steps += 1
        if self.steps == self.after_steps:
            signal.raise_signal(signal.SIGINT)

    on_chunk = on_step

    def on_epoch(self, *records: Any) -> None:
        pass

    def on_measuring(self) -> None:
        pass


def numbers(path: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """All numbers of a run's folder but the clock's, tensors as bytes: equal means bit for bit."""
    run = Run(RunFolder(path).config(), load("digits"), ranks)
    load_checkpoint(run, path / "checkpoint.safetensors")
    assert run.topology is not None
    metrics = [{k: v for k, v in record.items() if k not in CLOCK} for record in RunFolder(path).metrics()]
    states = run.model.state_dict(), run.optimizer.state_dict(), run.topology.state_dict()
    return _plain({"states": list(states), "rng": run.rng_state, "step": run.step, "metrics": metrics})


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _layers(run: Run) -> list[SparseLinear]:
    return [module for module in run.model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("method", MOVING)
def test_the_connections_move_as_the_method_says(method: str) -> None:
    run = Run(replace(SMALL, method=method), load("digits"))
    begin = [layer.connections.pattern for layer in _layers(run)]
    assert {round(p.sparsity, 2) for p in begin} == ({0.0} if method == "gmp" else {0.9})
    seen = []
    for _ in range(3):
        run.advance(run.steps_per_epoch)
        seen.append(run.finish_epoch()["topology"])
    assert [state["updates"] for state in seen] == [2, 2, 2 if method == "gmp" else 1]
    assert seen[-1]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    for before, layer, record in zip(begin, _layers(run), seen[-1]["layers"], strict=True):
        both = torch.isin(layer.connections.pattern.positions(), before.positions())
        assert (record["nnz"], record["initial_nnz"]) == (layer.nnz, before.nnz)
        assert record["size"] == layer.in_features * layer.out_features
        if method == "gmp":
            assert record["unmoved"] == layer.nnz == int(both.sum())
        else:  # what went and came back has moved, and stands where a connection was at the start
            assert layer.nnz == before.nnz and 0 < record["unmoved"] <= int(both.sum()) < layer.nnz
    dropped, grown = (sum(state[name] for state in seen) for name in ("dropped", "grown"))
    assert dropped - grown == sum(p.nnz for p in begin) - sum(layer.nnz for layer in _layers(run))
    assert (grown == 0) == (method == "gmp")


def test_dead_and_new_units_are_counted() -> None:
    run = Run(replace(SMALL, sparsity=0.98, drop_fraction=0.9), load("digits"))
    assert run.topology is not None
    first = run.topology.survey()
    fan_in = [layer.connections.pattern.row_counts for layer in _layers(run)]
    assert [state.dead_units for state in first] == [int((counts == 0).sum()) for counts in fan_in]
    assert first[0].dead_units > 0 and all(state.new_units == 0 for state in first)
    run.advance(20)
    for layer, state, saved in zip(
        _layers(run), run.topology.survey(), run.topology.state_dict()["layers"].values(), strict=True
    ):
        rows = layer.connections.pattern.row_indices()
        live, old = set(rows.tolist()), set(rows[saved["unmoved"]].tolist())
        assert (state.dead_units, state.new_units) == (layer.out_features - len(live), len(live - old))
        assert state.new_units > 0


# Stops before, at and after the update of step 20; at the end of an epoch; between updates; after the last.
@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("stop", [19, 20, 21, 23, 35, 60])
def test_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, one_thread: None, method: str, stop: int) -> None:
    config = replace(SMALL, method=method)
    assert train(config, tmp_path / "whole", Stopper())
    assert not train(config, tmp_path / "parts", Stopper(stop))
    assert RunFolder(tmp_path / "parts").config().end_step == 51
    assert train(config, tmp_path / "parts", Stopper(), resume=True)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("lost", ["generator", "step", "unmoved", "explored"])
def test_the_comparison_sees_what_a_checkpoint_loses(tmp_path: Path, one_thread: None, lost: str) -> None:
    config, load_state = replace(SMALL, method="set"), Topology.load_state_dict

    def forgetful(topology: Topology, state: dict[str, Any]) -> None:
        fresh = topology.state_dict()
        if lost in ("unmoved", "explored"):
            for name, layer in state["layers"].items():
                layer[lost] = fresh["layers"][name][lost]
        else:
            state[lost] = fresh[lost]
        load_state(topology, state)

    assert train(config, tmp_path / "whole", Stopper())
    # Updates would mend `unmoved`: they drop the connections that came last, which are still the smallest.
    assert not train(config, tmp_path / "parts", Stopper(60 if lost == "unmoved" else 35))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "load_state_dict", forgetful)
        assert train(config, tmp_path / "parts", Stopper(), resume=True)
    assert numbers(tmp_path / "parts") != numbers(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from offpath.studies import RunConfig, train
from offpath.topology import controller
from test_train_methods import Stopper

torch.set_num_threads(1)
carry, calls = controller.carry_state, []

def kill(*arguments):
    calls.append(arguments)
    if len(calls) == 6:  # the first layer of the third update has moved, the second one's state is about to
        os.kill(os.getpid(), signal.SIGKILL)
    carry(*arguments)

controller.carry_state = kill
train(RunConfig.from_json(eval(sys.argv[2])), Path(sys.argv[1]), Stopper())
"""


@pytest.mark.parametrize("method", MOVING)
def test_run_killed_in_an_update_goes_on_to_the_same_bits(tmp_path: Path, one_thread: None, method: str) -> None:
    config = replace(SMALL, method=method)
    assert train(config, tmp_path / "whole", Stopper())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), repr(config.to_json())]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["epoch"] for record in RunFolder(tmp_path / "killed").metrics()] == [1]
    assert train(config, tmp_path / "killed", Stopper(), resume=True)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_more_epochs_keep_the_end_of_the_updates(tmp_path: Path, one_thread: None) -> None:
    longer = replace(SMALL, epochs=5)
    assert train(SMALL, tmp_path / "run", Stopper())
    assert train(longer, tmp_path / "run", Stopper(), resume=True)
    assert RunFolder(tmp_path / "run").config() == replace(longer, end_step=end_of_updates(69))
    assert [record["topology"]["updates"] for record in RunFolder(tmp_path / "run").metrics()] == [2, 2, 1, 0, 0]
    assert train(replace(longer, end_step=51), tmp_path / "five", Stopper())
    assert numbers(tmp_path / "run") == numbers(tmp_path / "five")


def test_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    save_checkpoint(Run(SMALL, load("digits")), tmp_path / "checkpoint")
    for change, message in (({"method": "set"}, "method='rigl'"), ({"end_step": 40}, "end_step=51, not 40")):
        with pytest.raises(RunError, match=message):
            load_checkpoint(Run(replace(SMALL, **change), load("digits")), tmp_path / "checkpoint")


def test_config_from_before_there_were_methods_is_static() -> None:
    old = {
        k: v for k, v in RunConfig().to_json().items() if k in ("data", "model", "sparsity", "distribution", "epochs")
    }
    rest = {"batch_size": 128, "learning_rate": 1e-3, "seed": 0, "device": "cpu", "data_dir": None}
    assert RunConfig.from_json(old | rest) == RunConfig()


def test_static_connections_stay_and_the_metrics_say_so() -> None:
    run = Run(replace(SMALL, method="static"), load("digits"))
    run.advance(run.steps_per_epoch)
    topology = run.finish_epoch()["topology"]
    assert (topology["updates"], topology["dropped"], topology["grown"], topology["moved_share"]) == (0, 0, 0, 0.0)
    dense = Run(replace(SMALL, method="static", sparsity=0.0), load("digits"))
    dense.advance(dense.steps_per_epoch)
    assert dense.topology is None and "topology" not in dense.finish_epoch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "static, set, rigl, gmp, mest, got 'magic'"),
        ({"sparsity": 0.0}, "sparsity above 0 for method rigl"),
        ({"drop_fraction": 0.0}, r"drop_fraction in \(0, 1\]"),
        ({"drop_fraction": float("nan")}, r"drop_fraction in \(0, 1\]"),
        ({"update_freq": 0}, "update_freq of at least 1"),
        ({"end_step": 0}, "end_step of at least 1"),
        ({"update_freq": 51}, "before step 51.* lower --update-freq or raise --epochs"),
        ({"method": "gmp", "sparsity": 0.99999}, "expected a connection to stay"),
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Run(replace(SMALL, **change), load("digits"))


def test_the_command_writes_a_page_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--method", "set", "--update-freq", 5, "--drop-fraction", 0.2, "--epochs", 2)
    first = run_offpath("train", "--data", "digits", "--model", "mlp-small", *options)
    assert first.exit_code == 0 and "moved" in first.stdout, first.stderr
    out = tmp_path / "runs" / "train-digits-mlp-small-set-s0.9-seed0"
    config = json.loads((out / "config.json").read_text())
    assert (config["method"], config["update_freq"], config["drop_fraction"]) == ("set", 5, 0.2)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "src=" not in page and "http-equiv" not in page
    for text in ("layer densities over epochs", "connections that have moved", "positions explored", "dead units"):
        assert text in page
    refused = run_offpath("train", "--out", out, "--resume", "--method", "rigl")
    assert refused.exit_code == 1 and "go on with method='set'" in refused.stderr
    assert run_offpath("train", "--out", out, "--resume", "--epochs", 3).exit_code == 0
    assert json.loads((out / "config.json").read_text())["end_step"] == config["end_step"]


def test_report_of_a_run_that_has_nothing_to_show_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").start(SMALL)
    with pytest.raises(RunError, match="expected a finished epoch"):
        write_report(tmp_path / "run")


def test_race_takes_a_moving_twin_that_is_sparse_from_the_start(tmp_path: Path, one_thread: None) -> None:
    assert train(SMALL, tmp_path / "whole", Stopper())
    assert race(SMALL, tmp_path / "parts", Stopper(4)) is None
    result = race(SMALL, tmp_path / "parts", Stopper(), resume=True)
    assert result is not None and result.config["end_step"] == 51
    assert result.sparse.epochs[0]["topology"]["updates"] == 2 and "topology" not in result.dense.epochs[0]
    assert numbers(tmp_path / "parts" / "sparse") == numbers(tmp_path / "whole")
    with pytest.raises(RunError, match="sparse from the start"):
        race(replace(SMALL, method="gmp"), tmp_path / "gmp", Stopper())
