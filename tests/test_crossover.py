"""Break-evens of curves that are known, products that are wrong, and the command from end to end."""

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
from hypothesis import given, strategies as st

from mutants import MUTANTS
from offpath import kernels, pattern as patterns
from offpath.cost.bounds import Expected, excess, expected
from offpath.cost.crossover import DENSE, OFFPATH, PRODUCTS, TORCH_SPARSE, Contender, break_even, measure
from offpath.kernels import Backend
from offpath.studies import RunError
from offpath.studies.crossover import CrossoverConfig, CrossoverResult, contenders, crossover, run
from offpath.studies.crossover.config import shapes_from
from offpath.studies.crossover.contenders import Layers, Workload
from offpath.studies.crossover.report import write_report
from offpath.studies.crossover.tables import NOT_COMPUTED, WRONG, blocks, crossover_block
from test_timing import Clock

SPARSITIES = st.floats(0, 0.999)
CURVES = st.lists(
    st.tuples(SPARSITIES, st.floats(0.01, 100)), min_size=1, max_size=10, unique_by=lambda point: point[0]
)
SMALL = CrossoverConfig(
    shapes=((24, 17),), batches=(1, 33), dtypes=("float32",), sparsities=(0.5, 0.9), budget_seconds=1e-4
)
ONE = ["--shape", "24x17", "--batch", "5", "--dtype", "float32", "--sparsity", "0.5"]


# The break-even


@given(CURVES)
def test_from_the_break_even_on_sparse_is_never_slower(points: list[tuple[float, float]]) -> None:
    found = break_even(points)
    if found.sparsity is None:
        assert found.found == "never" and max(points)[1] < 1
        return
    assert all(speedup >= 1 for sparsity, speedup in points if sparsity >= found.sparsity and found.found == "lowest")
    above = [speedup for sparsity, speedup in points if sparsity > found.sparsity]
    below = [(sparsity, speedup) for sparsity, speedup in points if sparsity < found.sparsity]
    assert all(speedup >= 1 for speedup in above)
    assert (found.found == "lowest") == (not below)
    # It is the smallest: just below it, sparse is slower.
    assert not below or max(below)[1] < 1 or math.isclose(max(below)[1], 1)


@given(CURVES, st.randoms())
def test_order_of_the_points_does_not_matter(points: list[tuple[float, float]], random: Any) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)
    assert break_even(shuffled) == break_even(points)


@given(st.floats(0.05, 0.95), st.floats(0.2, 3))
def test_power_law_breaks_even_where_it_does(where: float, exponent: float) -> None:
    """time = ((1 - s) / (1 - where))^exponent: straight in log time over log density, so found to rounding."""
    points = [(s, ((1 - where) / (1 - s)) ** exponent) for s in (0.0, 0.3, 0.6, 0.99)]
    found = break_even(points)
    assert found.found == "between" and found.sparsity is not None
    # Each log and exp errs by an ulp of numbers below 5; they are divided by exponent * (a log ratio of 0.36 or more).
    assert abs(found.sparsity - where) <= 100 * 2**-52 * 5 / (0.36 * exponent)


def test_later_dip_counts() -> None:
    assert break_even([(0.1, 2.0), (0.5, 0.5), (0.9, 2.0)]).sparsity == pytest.approx(1 - math.sqrt(0.5 * 0.1))


def test_edges_of_the_break_even_say_what_is_known() -> None:
    assert str(break_even([(0.1, 1.0)])) == "≤ 10%"
    assert str(break_even([(0.1, 3.0), (0.985, 0.99)])) == "> 98.5%"
    with pytest.raises(ValueError, match="expected at least one"):
        break_even([])


# Checked before it is timed


def test_bound_takes_right_sums_and_refuses_wrong_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        x, w = a.to(dtype), b.to(dtype)
        size = x.float().abs() @ w.float().abs().t()
        right = expected(x.double() @ w.double().t(), size, torch.tensor(300), dtype)
        y = (x.float() @ w.float().t()).to(dtype)
        assert excess(y, right) is None
        largest = right.bound.argmax()
        for change in (2.1, -2.1, math.nan, math.inf):
            wrong = right.exact.clone()
            wrong.view(-1)[largest] += change * right.bound.view(-1)[largest]
            assert not (excess(wrong, right) or 0) <= 2
        assert excess(y[1:], right) == math.inf
    in_low_precision = (a.bfloat16() * b.bfloat16()).cumsum(1, dtype=torch.bfloat16)[:, -1]
    right = expected(
        (a.bfloat16().double() * b.bfloat16().double()).sum(1),
        (a.bfloat16().float() * b.bfloat16().float()).abs().sum(1),
        torch.tensor(300),
        torch.bfloat16,
    )
    assert excess(in_low_precision, right) is not None, "a sum in bfloat16 must not pass for one in float32"


def _contender(clock: Clock, name: str, result: float, seconds: float = 1.0, **more: Any) -> Contender:
    call = clock.lasting(name, seconds)

    def run() -> tuple[torch.Tensor]:
        call()
        return (torch.tensor([result]),)

    return Contender(name, "", run, [Expected(torch.tensor([1.0]).double(), torch.tensor([0.5]).double())], **more)


def test_wrong_contender_is_called_once_and_gets_no_time() -> None:
    clock = Clock()
    right, wrong, nan = measure(
        [_contender(clock, "a", 1.5), _contender(clock, "b", 2.0), _contender(clock, "c", math.nan)], 0.0, clock=clock
    )
    assert right.status == "measured" and right.timing is not None
    assert wrong.status == nan.status == "wrong" and wrong.timing is nan.timing is None
    assert wrong.reason == "off by 2 times the error bound"
    assert clock.called.count("b") == clock.called.count("c") == 1


def test_refusal_is_told_and_any_other_error_is_raised() -> None:
    def refuse() -> tuple[torch.Tensor]:
        raise kernels.KernelError("not today")

    (refused,) = measure([Contender("a", "", refuse, [], (kernels.KernelError,))], 0.0)
    assert (refused.status, refused.reason, refused.timing) == ("not computed", "not today", None)
    with pytest.raises(kernels.KernelError):
        measure([Contender("a", "", refuse, [])], 0.0)


def test_slow_reference_is_called_once() -> None:
    clock = Clock()
    slow, other = measure(
        [
            _contender(clock, "slow", 1.0, seconds=9.0, only_for_reference=True),
            _contender(clock, "other", 1.0, seconds=9.0),
        ],
        5.0,
        clock=clock,
    )
    assert clock.called.count("slow") == 1 and slow.timing is not None
    assert (slow.timing.median_seconds, slow.timing.rounds) == (9.0, 1)
    assert other.timing is not None and other.timing.rounds > 1


def _workload(batch: int, dtype: torch.dtype = torch.float32) -> Workload:
    generator = torch.Generator().manual_seed(3)
    pattern = patterns.from_mask(torch.rand(19, 31, generator=generator) >= 0.6)
    return Workload(Layers(pattern, dtype, generator), batch, generator)


@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_way_is_right(product: str, batch: int) -> None:
    outcomes = measure(_workload(batch).contenders(product), 1e-4)
    assert {o.method for o in outcomes} >= {DENSE, OFFPATH}
    assert [(o.way, o.reason) for o in outcomes if o.status != "measured"] == []
    assert all(o.timing and o.timing.rounds >= 3 for o in outcomes if o.method != TORCH_SPARSE)


@pytest.mark.parametrize("product", PRODUCTS)
def test_large_layer_is_checked_in_part_and_at_both_ends(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHECKED_FEATURES", 13)
    monkeypatch.setattr(contenders, "CHECKED_AT_EACH_END", 2)
    workload = _workload(9)
    rows, columns = workload.layers.rows.tolist(), workload.layers.columns.tolist()
    assert rows == sorted(set(rows)) and columns == sorted(set(columns)) and len(rows) == len(columns) == 13
    assert {0, 1, 17, 18} <= set(rows) and {0, 1, 29, 30} <= set(columns)
    for contender in workload.contenders(product):
        results = contender.run()
        assert [excess(result, right) for result, right in zip(results, contender.expected, strict=True)].count(
            None
        ) == len(results)
        for result, right in zip(results, contender.expected, strict=True):
            flat = result.clone()
            flat[right.index] = math.nan
            assert right.index == () or 0 < int(flat.isnan().sum()) < flat.numel()
            assert excess(flat, right) == math.inf
            assert excess(result[:-1], right) == math.inf


def test_reference_known_to_be_slow_is_left_out_at_larger_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "REFERENCE_PATIENCE_SECONDS", 0.0)
    result = crossover(SMALL, tmp_path / "run", Watcher(), "offpath crossover")
    for point in result.points:
        told = point.reasons(TORCH_SPARSE, "not computed")
        has_reference = point.case.product in ("forward", "step")
        assert bool(told) == (has_reference and point.case.batch == 33)
        assert all("left out where a call would take over" in reason for reason in told)
        assert point.speedup(OFFPATH)
    assert any("left out" in note for note in blocks(result)[0].notes)


# Which products a wrong kernel makes wrong; those of `spmm` are asked for by never using a plan.
SPMM_ONLY = 2**31
SEEN_IN = {
    "drops the last connection": ("forward", "dx", "step"),
    "off by one row": ("forward", "dx", "step"),
    "wrong column": ("forward", "dx", "step"),
    "forgets the bias": ("forward", "step"),
    "sums in bfloat16": ("forward", "dx", "step"),
    "plan ignores the permutation": ("dx", "step"),
    "plan skips the last group": ("forward", "dx", "step"),
    "plan pads with the first sample": ("forward", "dx", "step"),
    "shifts the gradient": ("dweight", "step"),
    "swaps the gradient's operands": ("dweight", "step"),
    "gradient drops the last sample": ("dweight", "step"),
}


def _mutant(name: str) -> Backend:
    (backend,) = (m.backend for m in MUTANTS if m.backend.name == f"mutant: {name}")
    return backend if name.startswith("plan") else replace(backend, planned_from_batch=SPMM_ONLY)


@pytest.mark.parametrize("name", SEEN_IN)
def test_wrong_kernel_gets_no_speed(name: str) -> None:
    workload = _workload(17)
    with kernels.forced(_mutant(name)):
        outcomes = {product: measure(workload.contenders(product), 1e-4) for product in PRODUCTS}
    wrong = {product for product, found in outcomes.items() for o in found if o.status == "wrong"}
    assert wrong == set(SEEN_IN[name])
    assert all(o.timing is None for found in outcomes.values() for o in found if o.status == "wrong")


# The study


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
    assert CrossoverResult.from_json(json.loads(finished.to_text())) == replace(
        finished, seconds=round(finished.seconds, 1)
    )


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
    with kernels.forced(_mutant("forgets the bias")):
        result = crossover(SMALL, tmp_path / "run", Watcher(), "offpath crossover")
    rows = {row[0]: row for row in blocks(result)[0].rows}
    assert set(rows["forward"][2:5]) == set(rows["training step"][2:5]) == {WRONG}
    assert rows["input gradient"][2].endswith("x")
    assert {e["product"] for e in json.loads(result.to_text())["break_evens"] if e["method"] == OFFPATH} == {
        "dx",
        "dweight",
    }
    assert len(result.wrong) == 8


def test_existing_result_or_run_is_not_overwritten(tmp_path: Path) -> None:
    for name, content in (("crossover.json", "{}"), ("config.json", "{}")):
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
        ({"batches": (0,)}, "batches of at least 1"),
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
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, "crossover", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": path},
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
    done = _offpath("--quick", *ONE, "--seed", "7", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = _read(tmp_path / "run").config
    assert config.shapes == ((24, 17),) and config.seed == 7
    assert config.budget_seconds < CrossoverConfig().budget_seconds


def test_wrong_kernel_fails_the_command(tmp_path: Path) -> None:
    code = "from offpath import kernels\nfrom test_crossover import _mutant\n"
    code += "with kernels.forced(_mutant('shifts the gradient')):\n " + MAIN.replace("\n", "\n ")
    done = _offpath(*ONE, "--out", tmp_path / "run", code=code)
    assert done.returncode == 1
    assert "WRONG RESULT, so no speed: weight gradient, 24 → 17, float32, batch 5, 50% sparse" in done.stdout
    assert len(_read(tmp_path / "run").wrong) == 2


def test_ctrl_c_at_the_command_shows_and_keeps_what_there_is(tmp_path: Path) -> None:
    code = "import signal\nfrom offpath_cli.crossover_display import CrossoverDisplay\n"
    code += "CrossoverDisplay.on_point = lambda self, point: signal.raise_signal(signal.SIGINT)\n" + MAIN
    done = _offpath(*ONE, "--out", tmp_path / "run", code=code)
    assert done.returncode == 130, done.stderr
    assert "stopped after 1 of 4 measurements" in done.stdout and "forward" in done.stdout
    assert len(_read(tmp_path / "run").points) == 1 and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "big"], "expected a shape as INxOUT"),
        (["--dtype", "int8"], "expected a dtype among"),
        (["--sparsity", "1"], "expected sparsities in [0, 1), got 1.0"),
    ],
)
def test_bad_option_is_one_line_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = _offpath(*arguments, "--out", tmp_path / "run")
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
