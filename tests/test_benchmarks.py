"""The benchmarks' own logic, on numbers made up for it: what is met, where it breaks even, what is refused."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import any_batch
import bars
import cold_weights
from any_batch import beside_dense, excess_steps, worst_tail
from bar_jobs import BREAK_EVEN, JOBS, Effort, Job, break_even_figures
from children import environment
from contenders import CONTENDERS, Contender, Refused
from measure import Timing, WrongResult, check_forward, check_step, interleaved, speedup, training_step
from offpath.kernels import KernelError
from verdicts import Figure, break_even, cell, in_words, reasons, summary

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = (
    "Effort(rounds=2, passes=2, sample_seconds=0.0, shapes=((24, 16, 8),), sparsities=(0.5, 0.9, 0.0), "
    "batch_1_size=64, mlp_width=16)"
)
FIGURE = Figure("Layers", "fp32 24 -> 16, 8 forward", "50 %", bar=2.0)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"value": 2.0}, "met"),
        ({"value": 1.999}, "missed"),
        ({"value": None}, "missed"),
        ({"value": 9.0, "refused": "no kernel"}, "refused"),
        ({"value": 1.0, "bar": None}, None),
        ({"value": 0.35, "bar": 0.35, "at_most": True}, "met"),
        ({"value": 0.36, "bar": 0.35, "at_most": True}, "missed"),
        ({"value": None, "bar": 0.35, "at_most": True}, "missed"),
    ],
)
def test_verdict(change: dict, verdict: str | None) -> None:
    figure = replace(FIGURE, **change)
    assert figure.verdict == verdict
    assert verdict is None or verdict in cell(figure)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (2.0, "x", "2.00x"),
        (0.9499, "x", "0.94x"),
        (2.4, "x", "2.40x"),
        (12.68, "x", "12.6x"),
        (0.35, "%", "35.0 %"),
        (0.3501, "%", "35.1 %"),
    ],
)
def test_values_are_never_rounded_to_the_better_side_of_a_bar(value: float, unit: str, words: str) -> None:
    assert in_words(value, unit) == words


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([(0.2, 0.8), (0.4, 1.2)], 0.3),
        ([(0.4, 1.2), (0.2, 0.8)], 0.3),
        ([(0.0, 1.1), (0.5, 2.0)], 0.0),
        ([(0.0, 1.1), (0.2, 0.9), (0.4, 1.1), (0.6, 3.0)], 0.3),
        ([(0.2, 0.8), (0.4, 1.0)], 0.4),
        ([(0.2, 0.5), (0.4, 0.99)], None),
        ([], None),
    ],
)
def test_break_even(ratios: list[tuple[float, float]], expected: float | None) -> None:
    assert break_even(ratios) == expected


def test_break_even_figures_need_every_sparsity_and_pass_a_refusal_on() -> None:
    effort = Effort(shapes=((24, 16, 8),), sparsities=(0.5, 0.0))
    empty = [figure for job in JOBS["layers"](effort) for figure in job.figures]
    fp32 = [replace(f, value=1.5 if f.column == "50 %" else 0.5) for f in empty if f.row.startswith("fp32")]
    bf16 = [replace(f, refused="no kernel") for f in empty if f.row.startswith("bf16")]
    found = {(f.row[:4], f.column): f for f in break_even_figures(effort, fp32 + bf16)}
    assert found["fp32", "break-even, training"].value == 0.25
    assert found["fp32", "break-even, training"].verdict == "met"
    assert found["fp32", "lowest, forward"].value == 0.5
    assert {f.refused for key, f in found.items() if key[0] == "bf16"} == {"no kernel"}
    assert {f.row[:4] for f in break_even_figures(effort, fp32 + bf16[:-1])} == {"fp32", "bf16"}
    assert break_even_figures(effort, [f for f in fp32 if f.column == "50 %"]) == []


def test_every_bar_is_set_once() -> None:
    effort = Effort()
    figures = [figure for jobs in JOBS.values() for job in jobs(effort) for figure in job.figures]
    figures += break_even_figures(effort, [replace(figure, value=2.0) for figure in figures])
    with_bar = [(f.section, f.row, f.column) for f in figures if f.bar is not None]
    layers, batch_1, mlp, sparselab, avx2, derived = 3 * 5 * 4, 5, 1, 9, 3, 3 * 2 * 3
    assert len(with_bar) == len(set(with_bar)) == layers + batch_1 + mlp + sparselab + avx2 + derived


def test_reasons_and_summary() -> None:
    figures = [
        replace(FIGURE, value=3.0),
        replace(FIGURE, value=1.0),
        replace(FIGURE, refused="no kernel"),
        replace(FIGURE, refused="no kernel", section=BREAK_EVEN),
        replace(FIGURE, bar=None, value=1.0),
    ]
    assert reasons(figures) == [f"refused: no kernel (in: Layers; {BREAK_EVEN})"]
    assert summary(figures) == "4 bars: 1 met, 1 missed, 2 refused"


def test_the_page_names_the_machine_and_every_cell() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    bars.show(console, [replace(FIGURE, value=3.0, spread=0.02), replace(FIGURE, column="90 %", value=1.0)])
    page = console.export_text()
    for words in ("threads", "torch", "Layers", "50 %", "90 %", "3.00x ±2%", "bar 2 met", "1.00x", "bar 2 missed"):
        assert words in page


def test_interleaved_turns_the_order_and_speedup_takes_medians() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = interleaved(calls, rounds=3, sample_seconds=0.0)
    assert "".join(seen) == "aabb" + "ab" + "ba" + "ab"
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"a": 3, "b": 3}
    found = speedup(Timing((4.0, 4.0, 400.0)), Timing((2.0, 2.0, 2.0)))
    assert found.ratio == 2.0
    assert found.spread == (101 - 2) / 2 / 2


def test_a_training_step_counts_as_one_after_an_optimizer_step() -> None:
    layer, x, dy = torch.nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    before = layer.weight._version
    training_step(layer, x, dy)
    assert layer.weight._version > before
    first = layer.weight.grad.clone()
    training_step(layer, x, dy)
    assert torch.equal(layer.weight.grad, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_passes_its_check(name: str, dtype: torch.dtype) -> None:
    try:
        contender = CONTENDERS[name](96, 64, 0.8, dtype)
        x, dy = torch.randn(32, 96, dtype=dtype), torch.randn(32, 64, dtype=dtype)
        check_forward(contender, x)
        check_step(contender, x, dy)
    except (KernelError, Refused) as error:
        pytest.skip(f"refused: {error}")


def _wrong_in(place: str) -> Callable[[Tensor], Tensor]:
    """Identity whose result (for "y") or gradient (elsewhere) has one entry that is wrong by two percent."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return _off(x) if place == "y" else x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy if place == "y" else _off(dy)

    return Wrong.apply


def _off(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.abs().argmax()] *= 1.02
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", ["y", "dX", "dW", "db", "NaN"])
def test_a_wrong_result_is_caught(place: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            wrong = _wrong_in(place)
            weight = wrong(self.weight) if place == "dW" else self.weight
            bias = wrong(self.bias) if place == "db" else self.bias
            x = wrong(x) if place == "dX" else x
            y = torch.nn.functional.linear(x, weight, bias)
            return wrong(y) if place == "y" else y * math.nan if place == "NaN" else y

    layer = Layer(96, 64, dtype=dtype)
    rows, columns = torch.ones(64, 96, dtype=torch.bool).nonzero(as_tuple=True)
    contender = Contender(
        "wrong", layer, lambda: layer.weight, lambda: (rows, columns, layer.weight.grad[rows, columns])
    )
    with pytest.raises(WrongResult, match="y" if place == "NaN" else place):
        check_step(contender, torch.randn(32, 96, dtype=dtype), torch.randn(32, 64, dtype=dtype))


def _job(measure: Callable[[], Sequence[tuple[Timing, Timing]]]) -> Job:
    return Job((FIGURE,), measure)


def _raises(error: BaseException) -> Callable[[], Sequence[tuple[Timing, Timing]]]:
    def measure() -> Sequence[tuple[Timing, Timing]]:
        raise error

    return measure


def _main(monkeypatch: pytest.MonkeyPatch, path: Path, *jobs: Job) -> tuple[int, dict]:
    monkeypatch.setattr(bars, "JOBS", {"only": lambda effort: jobs})
    status = bars.main(["--json", str(path)], Effort(shapes=()))
    return status, json.loads(path.read_text())


def test_no_time_is_reported_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = _job(lambda: [(Timing((6.0,)), Timing((2.0,)))])
    wrong, refused = _job(_raises(WrongResult("dW"))), _job(_raises(KernelError("no kernel")))
    status, content = _main(monkeypatch, tmp_path / "bars.json", good, wrong, refused)
    assert status == 1
    assert [f["verdict"] for f in content["figures"]] == ["met", "refused", "refused"]
    assert [f["value"] for f in content["figures"]] == [3.0, None, None]
    assert [f["refused"] for f in content["figures"]] == [None, "wrong result: dW", "no kernel"]
    assert _main(monkeypatch, tmp_path / "bars.json", good, refused)[0] == 0


def test_a_job_that_fails_loses_no_other_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = _job(lambda: [(Timing((6.0,)), Timing((2.0,)))])
    status, content = _main(monkeypatch, tmp_path / "bars.json", _job(_raises(IndexError("slot 7 of 5"))), good)
    assert status == 1
    assert [f["refused"] for f in content["figures"]] == ["IndexError: slot 7 of 5", None]
    assert [f["value"] for f in content["figures"]] == [None, 3.0]


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = _job(lambda: [(Timing((6.0,)), Timing((2.0,)))])
    status, content = _main(monkeypatch, tmp_path / "bars.json", good, _job(_raises(KeyboardInterrupt())), good)
    assert status == bars.INTERRUPTED
    assert content["finished"] is False
    assert len(content["figures"]) == 1


def test_the_whole_command_on_tiny_layers(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"from bars import main; from bar_jobs import Effort\nsys.exit(main(['--json', 'out/bars.json'], {TINY}))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    content = json.loads((tmp_path / "out" / "bars.json").read_text())
    assert content["machine"]["processor"] in (tmp_path / "out" / "bars.txt").read_text()
    assert {figure["verdict"] for figure in content["figures"]} <= {"met", "missed", "refused", None}
    assert all((figure["value"] is None) >= (figure["refused"] is not None) for figure in content["figures"])
    fp32_layers = [f for f in content["figures"] if f["section"] == "Layers" and f["row"].startswith("fp32")]
    assert len(fp32_layers) == 4
    assert all(figure["value"] > 0 and len(figure["seconds"]) == 2 for figure in fp32_layers)


def test_the_suite_checks_every_product_and_layer_that_it_would_time() -> None:
    suite = [str(BENCHMARKS / name) for name in ("test_kernels.py", "test_layers.py")]
    options = ["--benchmark-disable", "-q", "-p", "no:cacheprovider", "-k", "fp32 and offpath and not 2048 and not 768"]
    command = [sys.executable, "-m", "pytest", *suite, *options]
    run = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout and "failed" not in run.stdout


def test_a_cliff_is_found_where_it_is() -> None:
    batches = list(range(1, 129))
    smooth = [1e-4 + 1e-5 * batch for batch in batches]
    assert excess_steps(batches, smooth).max() < 0.05
    cliff = [seconds * (1.6 if batch >= 65 else 1) for batch, seconds in zip(batches, smooth, strict=True)]
    steps = excess_steps(batches, cliff)
    assert batches[int(steps.argmax())] == 64
    assert 0.3 < steps.max() < 0.7  # the trend through the neighbours takes a part of the 60 % for its own


def test_the_plot_over_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plots" / "any_batch.svg"
    size = ["--inputs", "24", "--outputs", "16", "--max-batch", "20", "--rounds", "2"]
    for what, options in (("forward", []), ("training step", ["--step"])):
        assert any_batch.main([*size, *options, "--out", str(out)]) == 0
        content = json.loads(out.with_suffix(".json").read_text())
        assert content["what"] == f"{what}, 24 -> 16, 90%"
        assert content["batches"] == list(range(1, 21))
        assert all(len(seconds) == 20 and min(seconds) > 0 for seconds in content["seconds"].values())
        assert {"fp32 dense", "fp32 offpath", "bf16 dense"} <= set(content["cliffs"])
        assert "<svg" in out.read_text()
        said = capsys.readouterr().out
        assert "fp32 offpath largest step" in said
        assert said.count("times as long as offpath") == len(content["seconds"]) // 2
    with pytest.raises(SystemExit):
        any_batch.main(["--max-batch", "15", "--out", str(out)])
    assert "expected --max-batch of at least 16, a full vector, got 15" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--step"]])
def test_layers_in_turn(tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "tables" / "cold.txt"
    cold_weights.main(["--size", "24", "--layers", "2", "--rounds", "1", *options, "--out", str(out)])
    machine, *lines = out.read_text().splitlines()
    assert "threads" in machine
    what = "training step" if options else "forward"
    assert [line for line in lines if "in turn" in line] == [
        f"{dtype} {what}, 2 layers of 24 -> 24 in turn" for dtype in ("fp32", "bf16")
    ]
    figures = [line.split() for line in lines if "x" in line]
    assert [int(tokens) for tokens, *_ in figures] == 2 * list(cold_weights.TOKENS)
    assert all(len(cells) == 2 * len(cold_weights.SPARSITIES) for _, *cells in figures)


def test_where_dense_takes_less() -> None:
    got = beside_dense([1, 2, 3, 4, 8], [2.0, 0.9, 0.8, 1.0, 0.5], [1.0] * 5)
    assert got == "dense takes 0.50 (8) to 2.00 (1) times as long as offpath; less at 2 to 3, 8"
    assert beside_dense([1, 2], [2.0, 1.0], [1.0, 1.0]).endswith("less at no size")


def test_the_costliest_tail() -> None:
    batches = [14, 15, 16, 17, 31, 32, 33]
    assert worst_tail(batches, [1.0, 1.3, 1.0, 2.2, 2.0, 2.0, 9.0], vector=16) == (15, 1.3)
