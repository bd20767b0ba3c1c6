"""`offpath crossover`: the study and the command, from end to end on tiny layers."""

from __future__ import annotations

import json
import math
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
from offpath import kernels
from offpath.cost.crossover import DENSE, OFFPATH, PRODUCTS, TORCH_SPARSE
from offpath.studies import RunError
from offpath.studies.crossover import CrossoverConfig, CrossoverResult, crossover, run
from offpath.studies.crossover.config import shapes_from
from offpath.studies.crossover.report import write_report
from offpath.studies.crossover.tables import NOT_COMPUTED, WRONG, blocks, crossover_block
from test_crossover import wrong_backend

SMALL = CrossoverConfig(
    shapes=((24, 17),), batches=(1, 33), dtypes=("float32",), sparsities=(0.5, 0.9), budget_seconds=1e-4
)
ONE = ["--shape", "24x17", "--batch", "5", "--dtype", "float32", "--sparsity", "0.5"]


class Watcher:
    """Raises SIGINT as Ctrl-C does, once it has seen so many points."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen = 0
        self.stop_after = stop_after

    def on_start(self, config: Any) -> None:
        pass

    def on_case(self, case: Any, sparsity: float) -> None:
        pass

    def on_point(self, point: Any) -> None:
        self.seen += 1
        if self.seen == self.stop_after:
            signal.raise_signal(signal.SIGINT)


def _read(folder: Path) -> CrossoverResult:
    return CrossoverResult.from_json(json.loads((folder / "crossover.json").read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CrossoverResult:
    return crossover(SMALL, tmp_path_factory.mktemp("crossover") / "run", Watcher(), "offpath crossover")


def test_whole_grid_is_measured_and_read_back_as_it_was(finished: CrossoverResult) -> None:
    assert finished.complete and len(finished.points) == SMALL.points == 16
    assert all(p.speedup(OFFPATH) and not p.reasons(OFFPATH, "wrong") for p in finished.points)
    assert CrossoverResult.from_json(json.loads(finished.to_text())) == finished


def test_json_names_machine_versions_date_and_command(finished: CrossoverResult) -> None:
    values = json.loads(finished.to_text())
    assert {"offpath", "torch", "processor", "threads", "backend"} <= set(values["machine"])
    assert values["command"] == "offpath crossover" and values["date"].endswith("+00:00") and values["complete"]
    cases = {(e["product"], e["batch"], e["method"]) for e in values["break_evens"]}
    assert {(p, b, OFFPATH) for p in PRODUCTS for b in (1, 33)} <= cases
    with pytest.raises(ValueError, match=r"expected a crossover\.json of format"):
        CrossoverResult.from_json(values | {"format": 0})


def test_table_has_every_row_and_a_ratio_in_every_cell(finished: CrossoverResult) -> None:
    (block,) = blocks(finished)
    assert block.title == "24 → 17, float32" and block.header[:4] == ("product", "batch", "50%", "90%")
    assert [row[1] for row in block.rows] == ["1", "33"] * 4
    assert all(len(row) == len(block.header) and row[2].endswith("x") and row[3].endswith("x") for row in block.rows)
    assert not block.notes
    assert crossover_block(finished).count("| 24 → 17, float32 |") == 2


def test_page_and_plot_are_whole_and_self_contained(finished: CrossoverResult, tmp_path: Path) -> None:
    write_report(finished, tmp_path)
    page, plot = (tmp_path / "report.html").read_text(), (tmp_path / "crossover.svg").read_text()
    assert plot.startswith("<svg") and page.count("<svg") == 2 and plot in page
    assert "pays from" in page and "It is no theoretical peak" in page and "Incomplete" not in page
    assert "<script" not in page and "<link" not in page and "src=" not in page


@pytest.mark.parametrize("stop_after", [1, 6, 15])
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, stop_after: int) -> None:
    result = crossover(SMALL, tmp_path / "run", Watcher(stop_after), "offpath crossover")
    assert not result.complete and len(result.points) == stop_after
    assert len(_read(tmp_path / "run").points) == stop_after and not _read(tmp_path / "run").complete
    write_report(result, tmp_path / "run")
    assert f"stopped after {stop_after} of 16" in (tmp_path / "run" / "report.html").read_text()
    assert all(len(row) == len(block.header) for block in blocks(result) for row in block.rows)


def test_dtype_that_the_backend_refuses_is_told(tmp_path: Path) -> None:
    backend = kernels.default_backend()[0]
    only_float32 = replace(backend, computes=lambda device, dtype: dtype is torch.float32)
    config = replace(SMALL, dtypes=("float32", "bfloat16"), batches=(1,))
    with kernels.forced(only_float32):
        result = crossover(config, tmp_path / "run", Watcher(), "offpath crossover")
    assert result.complete
    computed, refused = blocks(result)
    assert all(NOT_COMPUTED not in row for row in computed.rows)
    assert refused.title.endswith("bfloat16")
    assert all(set(row[2:5]) == {NOT_COMPUTED} for row in refused.rows)
    assert any(note.startswith(f"{NOT_COMPUTED} not computed here: backend") for note in refused.notes)
    # The dense times of both dtypes are there all the same.
    assert all(point.timing(DENSE) for point in result.points)
    write_report(result, tmp_path / "run")
    assert "not computed here" in (tmp_path / "run" / "report.html").read_text()


def test_wrong_row_has_no_break_even(tmp_path: Path) -> None:
    with kernels.forced(wrong_backend("forgets the bias")):
        result = crossover(SMALL, tmp_path / "run", Watcher(), "offpath crossover")
    rows = {row[0]: row for row in blocks(result)[0].rows}
    assert set(rows["forward"][2:5]) == set(rows["training step"][2:5]) == {WRONG}
    assert rows["input gradient"][2].endswith("x")
    assert {e["product"] for e in json.loads(result.to_text())["break_evens"] if e["method"] == OFFPATH} == {
        "dx",
        "dweight",
    }
    assert len(result.wrong) == 8


def test_reference_known_to_be_slow_is_left_out_at_larger_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "REFERENCE_PATIENCE_SECONDS", 0.0)
    config = replace(SMALL, batches=(1, 8, 33))
    result = crossover(config, tmp_path / "run", Watcher(), "offpath crossover")
    for point in result.points:
        told = point.reasons(TORCH_SPARSE, "not computed")
        has_reference = point.case.product in ("forward", "step")
        assert bool(told) == (has_reference and point.case.batch == 33)
        assert all("left out where a call would take over" in reason for reason in told)
        assert point.speedup(OFFPATH)
    assert any("left out" in note for note in blocks(result)[0].notes)


def test_time_of_a_larger_batch_is_guessed_from_two_smaller_ones() -> None:
    assert run._guess_seconds({16: 2.0, 256: 26.0, 4096: 9.0}, 1024) == pytest.approx(26.0 + 0.1 * 768)
    assert run._guess_seconds({1: 9.0, 16: 8.0}, 256) == 8.0
    assert run._guess_seconds({16: 0.001, 17: 17.0}, 34) == 34.0
    # The fixed costs of batch 1 say nothing about batch 256.
    assert run._guess_seconds({1: 9.0}, 256) == run._guess_seconds({}, 256) == 0.0


def test_existing_result_or_run_is_not_overwritten(tmp_path: Path) -> None:
    for name, content in (("crossover.json", "{}"), ("config.json", "{}"), ("report.html", "")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(RunError, match="choose another --out"):
            crossover(SMALL, folder, Watcher(), "offpath crossover")
        assert (folder / name).read_text() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ()}, "at least one of shapes"),
        ({"shapes": ((0, 4),)}, "of 1 to"),
        ({"shapes": ((4, 10**6),)}, "of 1 to"),
        ({"batches": (0,)}, "batches from 1 to"),
        ({"dtypes": ("float16",)}, "a dtype among float32, bfloat16"),
        ({"sparsities": (1.0,)}, r"sparsities in \[0, 1\)"),
        ({"sparsities": (math.nan,)}, r"sparsities in \[0, 1\)"),
        ({"budget_seconds": 0.0}, "positive, finite"),
        ({"seed": -1}, "seed"),
    ],
)
def test_config_that_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        CrossoverConfig(**change)


def test_config_reads_from_left_to_right() -> None:
    config = CrossoverConfig(sparsities=(0.9, 0.5, 0.9), batches=(4, 1, 4))
    assert config.sparsities == (0.5, 0.9) and config.batches == (4, 1)
    assert CrossoverConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("text", ["768", "768x", "axb", "768x3072x2", "-1x4"])
def test_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="INxOUT"):
        shapes_from([text])


# The command

MAIN = "from offpath_cli import main\nmain()"


def _offpath(*arguments: object, code: str = MAIN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "crossover", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_prints_the_table_and_writes_everything(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = _offpath("--shape", "24x17", "--shape", "8x8", *ONE[2:], "--sparsity", "0.975", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for text in ("24 → 17, float32", "8 → 8, float32", "97.5%", "training step", "pays from", "report.html"):
        assert text in done.stdout
    assert {p.name for p in out.iterdir()} == {".lock", "crossover.json", "crossover.svg", "report.html"}
    result = _read(out)
    assert result.complete and len(result.points) == 16
    assert result.command.startswith("offpath crossover --shape 24x17")
    again = _offpath(*ONE, "--out", out)
    assert again.returncode == 1 and "already holds a crossover.json; choose another --out" in again.stderr


def test_quick_takes_options_as_well(tmp_path: Path) -> None:
    done = run_offpath("crossover", "--quick", *ONE, "--seed", "7", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    config = _read(tmp_path / "run").config
    assert config.shapes == ((24, 17),) and config.seed == 7
    assert config.budget_seconds < CrossoverConfig().budget_seconds


def test_wrong_kernel_fails_the_command(tmp_path: Path) -> None:
    with kernels.forced(wrong_backend("shifts the gradient")):
        done = run_offpath("crossover", *ONE, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "WRONG RESULT, so no speed: weight gradient, 24 → 17, float32, batch 5, 50% sparse" in done.stdout
    assert len(_read(tmp_path / "run").wrong) == 2


def test_ctrl_c_at_the_command_shows_and_keeps_what_there_is(tmp_path: Path) -> None:
    code = "import signal\nfrom offpath_cli.crossover_display import CrossoverDisplay\n"
    code += "CrossoverDisplay.on_point = lambda self, point: signal.raise_signal(signal.SIGINT)\n" + MAIN
    done = _offpath(*ONE, "--out", tmp_path / "run", code=code)
    assert done.returncode == 130, done.stderr
    assert "stopped after 1 of 4 measurements" in done.stdout and "forward" in done.stdout
    assert len(_read(tmp_path / "run").points) == 1 and (tmp_path / "run" / "report.html").exists()


def test_ctrl_c_before_the_first_measurement_leaves_the_folder_free(tmp_path: Path) -> None:
    code = "import signal\nfrom offpath_cli.crossover_display import CrossoverDisplay\n"
    code += "CrossoverDisplay.on_case = lambda self, *case: signal.raise_signal(signal.SIGINT)\n" + MAIN
    done = _offpath(*ONE, "--out", tmp_path / "run", code=code)
    assert done.returncode == 130, done.stderr
    assert "stopped after 0 of 4 measurements; nothing was written" in done.stdout
    again = run_offpath("crossover", *ONE, "--out", tmp_path / "run")
    assert again.exit_code == 0, again.stderr


def test_table_is_shown_where_the_disk_has_no_room_for_the_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same calls fail, with another number."""
    code = "import resource\nfrom offpath_cli.crossover_display import CrossoverDisplay\n"
    code += "limit = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    code += "CrossoverDisplay.on_point = limit\n" + MAIN
    done = _offpath(*ONE, "--out", tmp_path / "run", code=code)
    assert done.returncode == 1 and "24 → 17, float32" in done.stdout and "pays from" in done.stdout
    assert done.stderr.startswith("error: expected to write") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "crossover.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "big"], "expected a shape as INxOUT"),
        (["--dtype", "int8"], "expected a dtype among"),
        (["--sparsity", "1"], "expected sparsities in [0, 1), got 1.0"),
    ],
)
def test_bad_option_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run_offpath("crossover", *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
