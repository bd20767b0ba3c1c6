"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from commands import run_offpath
from offpath.kernels import cpu
from offpath_cli import main
from offpath_cli.commands import reports_errors

SMALL = ["--data", "digits", "--model", "mlp-small", "--epochs", "2"]


def _offpath(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from offpath_cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_does_not_load_torch() -> None:
    code = "import sys; sys.argv = ['offpath', '--help']\nfrom offpath_cli import main\n"
    code += "try:\n    main()\nexcept SystemExit: print(sorted({'torch', 'offpath'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.rstrip().endswith("[]")
    for command in ("info", "train", "race", "crossover", "data"):
        assert command in finished.stdout


def test_missing_extra_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom offpath_cli import main\nmain()"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1 and "pip install 'offpath[cli]'" in finished.stderr


@pytest.mark.parametrize("out", [["--out", ""], ["--out="]])
def test_an_empty_argument_is_no_folder(out: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["offpath", "train", *SMALL, *out])
    with pytest.raises(SystemExit, match="got an empty one"):
        main()
    assert not list(tmp_path.iterdir())


def test_info_says_what_was_chosen_and_why() -> None:
    slowest = next(iter(cpu.isas()))
    finished = _offpath("info", OFFPATH_ISA=slowest)
    assert finished.returncode == 0
    assert f"cpu:{slowest} (forced by OFFPATH_ISA)" in finished.stdout


def test_forced_isa_that_cannot_be_met_is_one_line() -> None:
    finished = _offpath("info", OFFPATH_ISA="sve2")
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: expected an ISA that runs here") and finished.stderr.count("\n") == 1


def test_train_prints_writes_and_resumes(tmp_path: Path) -> None:
    first = _offpath("train", *SMALL, "--out", tmp_path / "run", "--sparsity", "0.8")
    assert first.returncode == 0, first.stderr
    assert "epoch   2" in first.stdout and "test acc" in first.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sparsity"] == 0.8
    again = run_offpath("train", "--out", tmp_path / "run", "--resume", "--epochs", "3")
    assert again.exit_code == 0, again.stderr
    assert "epoch   3" in again.stdout and "epoch   2" not in again.stdout


def test_paths_are_shown_as_they_are_and_can_be_pasted_and_what_contradicts_the_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a [bold] [/b] :smile: folder"
    finished = run_offpath("train", *SMALL, "--out", out)
    assert finished.exit_code == 0 and f"the run is in {out}" in finished.stdout
    again = run_offpath("train", *SMALL, "--out", out)
    assert again.exit_code == 1 and f"{out} already holds a run" in again.stderr
    for options, message in (
        (["--sparsity", "0.5"], "go on with sparsity=0.9 as the run was started, got 0.5"),
        (["--epochs", "1"], "at least the 2 epochs"),
        (["--quick"], "--quick on a new run only"),
    ):
        refused = run_offpath("train", "--out", out, "--resume", *options)
        assert refused.exit_code == 1 and message in refused.stderr


def test_reader_that_leaves_gets_no_traceback() -> None:
    command = f"{sys.executable} -c 'from offpath_cli import main; main()' info | true"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in finished.stderr


def test_version() -> None:
    assert _offpath("--version").stdout.strip() == version("offpath")


def test_quick_caps_the_epochs(tmp_path: Path) -> None:
    finished = run_offpath("train", "--data", "digits", "--model", "mlp-small", "--quick", "--out", tmp_path / "run")
    assert finished.exit_code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2


def test_almost_everything_is_not_everything(tmp_path: Path) -> None:
    finished = run_offpath("train", *SMALL, "--sparsity", "0.99999999", "--quick", "--out", tmp_path / "run")
    assert finished.exit_code == 0, finished.stderr
    assert "99.999999% sparse" in finished.stdout and "100% sparse" not in finished.stdout


def test_race_prints_the_table_and_writes_the_page(tmp_path: Path) -> None:
    finished = run_offpath("race", *SMALL, "--out", tmp_path / "race", columns=40)
    assert finished.exit_code == 0, finished.stderr
    for text in (
        "test accuracy",
        "time a training step (median)",
        "dense / sparse",
        "optimizer bytes",
        "peak memory",
        "report.html",
    ):
        assert text in finished.stdout
    assert "racing" not in finished.stdout, "a bar in a file"
    assert "epoch   2  accuracy" in finished.stdout, "or nothing would tell how far it has come"
    assert {p.name for p in (tmp_path / "race").iterdir()} == {
        ".lock",
        "config.json",
        "dense",
        "race.json",
        "report.html",
        "sparse",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--sparsity", "1.5"], "expected sparsity in [0, 1), got 1.5"),
        (["train", "--sparsity", "nan"], "expected sparsity in [0, 1), got nan"),
        (["train", "--data", "imagenet"], "expected data to be one of digits"),
        (["train", "--data", "mnist", "--data-dir", "/nonexistent"], "mnist"),
        (["train", "--device", "cuda:99"], "cuda"),
        (["race", "--sparsity", "0"], "above 0"),
        (["train", "--drop-fraction", "0.5"], "no --drop-fraction, which would change nothing: --method static moves"),
        (["train", "--method", "gmp", "--drop-fraction", "0.5"], "--method gmp removes what is smallest"),
        (["race", "--update-freq", "5"], "no --update-freq"),
        (["train", "--sparsity", "0", "--distribution", "erk"], "--sparsity 0 has no connections"),
        (["train", "--data", "digits", "--data-dir", "/tmp"], "digits comes inside a Python package"),
        (["train", "--resume", "--out", "/nonexistent"], "expected a run in /nonexistent"),
        (["data", "digits"], "pip install"),
        (["crossover", "--batch", str(10**20)], "expected batches from 1 to 16777216"),
        (["train", "--model", "sae", "--data", "synthetic", "--latents", str(10**20)], "an int32 index can name"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = [] if "--out" in arguments or arguments[0] == "data" else ["--out", str(tmp_path / "run")]
    finished = run_offpath(*arguments, *out)
    assert finished.exit_code == 1
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert message in finished.stderr
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopping_leaves_a_usable_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--data", "digits", "--model", "mlp", "--epochs", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", "from offpath_cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"offpath train --out {shlex.quote(str(out))} --resume" in output
    epochs = len((out / "metrics.jsonl").read_text().splitlines())
    config = json.loads((out / "config.json").read_text()) | {"epochs": epochs + 1}
    (out / "config.json").write_text(json.dumps(config))
    resumed = run_offpath("train", "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"epoch {epochs + 1:>3}" in resumed.stdout


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 8 bytes\n at")])
def test_too_little_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @reports_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit):
        command()
    printed = capsys.readouterr().err
    assert printed.startswith("error: expected enough memory for what was asked, got: ") and printed.count("\n") == 1
