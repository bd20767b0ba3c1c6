"""Files of runs and studies: written as a whole by many processes, broken ones told of, in any locale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import pytest
import torch

from children import environment
from commands import run_offpath
from offpath.kernels import calibration, measured
from offpath.studies import RunError, train
from offpath.studies.checkpoint import load_checkpoint, save_checkpoint
from offpath.studies.compression.folder import StudyFolder as CompressionFolder
from offpath.studies.data import load
from offpath.studies.files import write_text, write_whole
from offpath.studies.folder import RunFolder
from offpath.studies.run import Run
from offpath.studies.sae.activations import _count, _shards
from offpath.studies.topology.folder import StudyFolder
from offpath.trainers.plain import from_plain, to_plain
from run_checks import assert_same
from test_train_methods import SMALL, Stopper

WRITERS = """
import sys
from pathlib import Path
from offpath.studies.files import write_text
for i in range(60):
    write_text(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_text(path, "start")
    command = [sys.executable, "-c", WRITERS, str(path)]
    running = [subprocess.Popen([*command, letter], stderr=subprocess.PIPE, text=True) for letter in "ab"]
    while any(process.poll() is None for process in running):
        assert path.read_text() in ("start", "a" * 5000, "b" * 5000)
    assert [process.communicate()[1] for process in running] == ["", ""]
    assert [left.name for left in tmp_path.iterdir()] == ["out.json"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_text(path, "old")

    def fails(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(RunError, match="no space; free space"):
        write_whole(path, fails)
    (tmp_path / ".out.json.tmp").write_text("of a killed process, and longer")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and [left.name for left in tmp_path.iterdir()] == ["out.json"]


def test_checkpoint_that_is_synced_is_the_one_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def watched(handle: int) -> None:
        fsync(handle)
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    path = tmp_path / "checkpoint.safetensors"
    (tmp_path / ".checkpoint.safetensors.tmp").write_bytes(b"of a killed process" * 100_000)
    run = Run(SMALL, load("digits"))
    for _ in range(2):
        run.advance()
        save_checkpoint(run, path)
        assert synced[-1] == (path.stat().st_ino, path.stat().st_size)
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    assert {left.name for left in tmp_path.iterdir()} == {"checkpoint.safetensors", "new"}
    again = Run(SMALL, load("digits"))
    load_checkpoint(again, path)
    assert_same(again.model.state_dict(), run.model.state_dict())


def test_text_is_utf8_and_the_terminal_shows_what_it_can(tmp_path: Path) -> None:
    ascii_only = environment() | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    options = ["--shape", "64x64", "--batch", "1", "--sparsity", "0.5", "--dtype", "float32", "--out"]
    offpath_command = str(Path(sys.executable).with_name("offpath"))
    run = subprocess.run(
        [offpath_command, "crossover", *options, str(tmp_path / "out")],
        env=ascii_only,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert "→" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_a_study_file_of_another_shape_is_told_of(content: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(content)
    for folder in (StudyFolder(tmp_path), CompressionFolder(tmp_path)):
        with pytest.raises(RunError, match=r"study\.json"):
            folder.config()


@pytest.mark.parametrize("content", ["", "x", "{}", "null", "0", '"3"'])
def test_a_broken_count_of_shards_means_to_take_them_again(content: str, tmp_path: Path) -> None:
    path = tmp_path / "shards.json"
    assert _count(path) == 0
    path.write_text(content)
    assert _count(path) == 0 and not _shards(tmp_path, 0)


@pytest.mark.parametrize(
    ("cpuinfo", "processor"),
    [
        ("model name\t: A 9\ncpu family\t: 26\nmodel\t: 2\n\nmodel name\t: B", "A 9 (family 26, model 2)"),
        ("CPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: 0xd4f\n", "(implementer 0x41, part 0xd4f)"),
        ("", ""),
    ],
)
def test_kept_measurements_are_of_one_processor(cpuinfo: str, processor: str) -> None:
    assert measured.processor_of(cpuinfo).endswith(processor)


@pytest.mark.parametrize("found", [{"forward": None}, {"forward": {"dense": 3}}, [], 3])
def test_a_cache_of_another_shape_is_measured_anew(found: object, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    ask = partial(measured.measured_once, "costs", "cpu:baseline", torch.float32, [], calibration._is_complete)
    ask(lambda: found)
    assert ask(lambda: "anew") == "anew"


def test_a_run_with_more_epochs_than_asked_for_is_told_of(tmp_path: Path) -> None:
    config = replace(SMALL, epochs=2)
    assert train(config, tmp_path, Stopper())
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match=r"expected at most \d+ steps.* go on with more --epochs"):
        folder.restore(Run(folder.settled(replace(config, epochs=1)), load("digits")))


def test_a_record_without_a_step_is_told_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics_file.write_text('{"step": "3"}\n{"step": 4}\n')
    with pytest.raises(RunError, match="expected a record in line 1"):
        folder.metrics()


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    finished = run_offpath("study", "topology", "--quick", "--jobs", "0", "--out", str(tmp_path / "out"))
    assert finished.exit_code != 0 and "job" in finished.output


# --- States of topologies ---------------------------------------------------------------------------------------------

DESCRIBED = """
from functools import partial
from offpath import topology
from offpath.topology import Recipe, Every, PerLayer, Constant, drop

class Signed:
    needs_dense_gradient = True
    def __call__(self, layer, count): ...

def powered(layer, power): ...

for rule in (drop.magnitude, partial(powered, power=2.0), Signed()):
    print(Recipe("mine", Every(3), rule, Signed(), PerLayer(Constant(0.3))).describe())
"""


def test_a_recipe_describes_itself_alike_in_every_process() -> None:
    with ThreadPoolExecutor() as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run([sys.executable, "-c", DESCRIBED], capture_output=True, text=True, check=True),
                range(2),
            )
        )
    first, second = (run.stdout.splitlines() for run in runs)
    assert first == second and " at 0x" not in "".join(first) and len(set(first)) == 3
    assert "drop=partial(powered, power=2.0)" in first[1]


def test_a_state_of_any_tensors_becomes_json_and_comes_back() -> None:
    state = {
        "history": {"passes": [(torch.randn(2, 6), torch.randn(2, 5).bfloat16())], "unmoved": torch.ones(9) > 0},
        "bits": torch.arange(5, dtype=torch.uint8),
        "none": None,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    back = from_plain(json.loads(json.dumps(to_plain(state))))
    (got_x, got_dy), (x, dy) = back["history"]["passes"][0], state["history"]["passes"][0]
    for got, right in (
        (got_x, x),
        (got_dy, dy),
        (back["history"]["unmoved"], state["history"]["unmoved"]),
        *((back[name], state[name]) for name in ("bits", "empty", "scalar")),
    ):
        assert got.dtype is right.dtype and torch.equal(got, right)
    assert back["none"] is None
