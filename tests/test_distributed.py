"""Many processes: the checks of `distributed_checks.py`, and `torchrun` as people start it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import distributed_checks
from offpath.studies.checkpoint import load_checkpoint
from offpath.studies.data import load
from offpath.studies.folder import RunFolder
from offpath.studies.run import Run
from test_train_methods import numbers

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "distributed.md"
OF_ONE = [c for c in distributed_checks.CHECKS if c.startswith("one_process")]
CHECKS = [c for c in distributed_checks.CHECKS if c not in OF_ONE]
# Four processes say nothing new of most checks: those whose sums have more terms, or whose shares are other ones.
OF_FOUR = [
    c for c in CHECKS if re.match("equals.* RigL|equals.* dense|gradient|other_connections|run_.*gmp|run_shares", c)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[int, str], list[str]]:
    """What each of the processes said of a check: they are started once for all checks."""
    said: dict[int, list[dict[str, str]]] = {}

    def of(count: int, check: str) -> list[str]:
        if count not in said:
            said[count] = _start(count, folder, {1: OF_ONE, 2: CHECKS, 4: OF_FOUR}[count])
        return [results.get(check, "not reached") for results in said[count]]

    return of


def _start(count: int, folder: Path, checks: list[str]) -> list[dict[str, str]]:
    command = [sys.executable, distributed_checks.__file__, str(folder), json.dumps(checks)]
    common = _environment() | {"WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT / "tests")}
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(count)]
    for process in processes:
        process.wait(timeout=200)
    return [json.loads((folder / f"results-{count}-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("check", OF_ONE)
def test_one_process(outcome: Callable[[int, str], list[str]], check: str) -> None:
    assert outcome(1, check) == [""]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcome: Callable[[int, str], list[str]], check: str) -> None:
    assert outcome(2, check) == ["", ""]


@pytest.mark.parametrize("check", OF_FOUR)
def test_four_processes(outcome: Callable[[int, str], list[str]], check: str) -> None:
    assert outcome(4, check) == [""] * 4


# --- As people start it ----------------------------------------------------------------------------------------------

OPTIONS = "--data digits --model mlp-small --method rigl --update-freq 5 --batch-size 65 --seed 1"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OFFPATH = (*TORCHRUN, "--no-python", str(Path(sys.executable).with_name("offpath")))
# Nothing here should take more than a few seconds; what hangs must not hang the tests.
PATIENCE_SECONDS = 200

# It says to whom it is connected, on standard output, in the middle of lines of others.
gloo_is_silent = pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="gloo of torch 2.10 is not")


def _environment() -> dict[str, str]:
    """One thread, and the cost table that all tests share: two tables may choose two methods, which round otherwise."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


KILLED = """
import os, signal
from offpath.topology import controller
from offpath_cli import main

carry, calls = controller.carry_state, []

def kill(*arguments):
    calls.append(arguments)
    if len(calls) == 12 and os.environ["RANK"] == "1":  # in the middle of the sixth update, in the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
    carry(*arguments)

controller.carry_state = kill
main()
"""


def _as_torchrun_would(rank: int, port: int) -> dict[str, str]:
    """Without its agent, which ends the processes that are left: they must end on their own."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return _environment() | {name: str(value) for name, value in names.items()} | {"TORCHELASTIC_RUN_ID": "test"}


@gloo_is_silent
def test_a_killed_process_ends_the_run_with_a_message_and_it_resumes_to_the_same_numbers(
    outcome: Callable[[int, str], list[str]], folder: Path, tmp_path: Path
) -> None:
    assert outcome(2, "run_stops_and_goes_on rigl") == ["", ""]  # the same run, uninterrupted, lies in its folder
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["train", *OPTIONS.split(), "--epochs", "2", "--out", str(tmp_path / "killed")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, *options],
            env=_as_torchrun_would(rank, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], said
    assert "expected all 2 processes of the run to answer" in said[0][1] and "--resume" in said[0][1]
    assert said[1][0] == "", "one process speaks"
    assert [record["epoch"] for record in RunFolder(tmp_path / "killed").metrics()] == [1]

    resumed = subprocess.run(
        [*OFFPATH, "train", "--resume", "--out", str(tmp_path / "killed")],
        env=_environment(), capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert resumed.returncode == 0 and resumed.stdout.count("the run is in") == 1, resumed.stderr
    assert (tmp_path / "killed" / "report.html").exists()
    assert numbers(tmp_path / "killed") == numbers(folder / "rigl-whole-2")


def test_ctrl_c_stops_all_processes_after_a_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    command = [*OFFPATH, "train", *OPTIONS.split(), "--epochs", "5000", "--out", str(tmp_path)]
    torchrun = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE_SECONDS
    while not RunFolder(tmp_path).metrics() and torchrun.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    torchrun.send_signal(signal.SIGINT)  # it hands the signal on to every process
    stdout, stderr = torchrun.communicate(timeout=PATIENCE_SECONDS)
    assert torchrun.returncode != 0 and stdout.count("stopped; go on with: offpath train --out") == 1, stderr
    run = Run(RunFolder(tmp_path).config(), load("digits"))
    load_checkpoint(run, tmp_path / "checkpoint.safetensors")
    assert run.step >= run.steps_per_epoch


# A thread that outlives its process group may abort the process when Python ends.
THREADS = """
import sys
from pathlib import Path

names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
sys.stderr.write("destroyed for good" if not any("gloo" in name for name in names) else str(names))
"""


@gloo_is_silent
def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python title=\"train.py\"\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "train.py").write_text(block + THREADS)
    command = [*TORCHRUN, "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(step \d+: \d+ connections moved\n)+", done.stdout) and "leak" not in done.stderr
    assert done.stderr.count("destroyed for good") == 2, done.stderr
