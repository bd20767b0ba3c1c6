"""The run on a GPU, as far as it goes without one: what it checks, times and refuses."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gpu.__main__ as command
from gpu import autoencoder, timing
from gpu.check import Case, exactly, judge, sums
from gpu.jobs import Job, Raced, Sides, Wanted, filled, work_through
from gpu.pays import rows
from gpu.sheet import WAITED_OUT, Check, Sheet, judged
from gpu.timing import Deadline, Effort, clone
from measure import Timing, WrongResult
from offpath import nn
from offpath.kernels import KernelError
from offpath.kernels.gpu import formats
from offpath.ops import SparseRows
from verdicts import Figure

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FIGURE = Figure("Decoding", "8192 x 8192", "50%", bar=1.5)
WANTED = Wanted(FIGURE, "ours", ("dense", "other dense"))


def test_the_interpreter_runs_every_triton_kernel_through_the_checks(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    made = tmp_path / "checks.json"
    part = [sys.executable, "-m", "gpu.part", "checks", str(made), "--scale", "tiny", "--seconds", "200", "--seed", "0"]
    run = subprocess.run(part, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    sheet = json.loads(made.read_text())
    assert sheet["finished"]
    assert [check for check in sheet["checks"] if check["problems"]] == []
    gathers = {"gather_sum", "gather_dot", "weight_gradient", "add_weight_gradient", "row_gradients", "counts"}
    gathers |= {"encoder_gradients", "written_out"}
    selections = {"topk", "batch_topk", "above", "encode_topk"}
    weights = {"spmm", "sddmm", "bitmap", "expand", "compress"}
    assert {check["kernel"] for check in sheet["checks"]} == gathers | selections | weights


def _case(call: Callable[[], Tensor], whole: bool = False) -> Case:
    exact = torch.arange(6).view(2, 3).double()
    right = exactly(exact) if whole else sums(exact, exact, torch.tensor(4), torch.float32)
    return Case("kernel", "case", call, lambda: (right,))


def _changing() -> Callable[[], Tensor]:
    calls = iter(range(100))
    return lambda: torch.arange(6).view(2, 3).float() * (1 + next(calls) * 2**-23)


def _unwritten() -> Tensor:
    y = torch.empty(2, 3)
    y[0], y[1, :2] = torch.arange(3), torch.arange(3, 5)
    return y


def _fails() -> Tensor:
    raise KernelError("no such product")


class _OutOfResources(Exception):
    """Triton's errors have no class in common with torch's."""


def _fails_in_triton() -> Tensor:
    raise _OutOfResources("too much shared memory")


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: torch.arange(6).view(2, 3).float(), None),
        (_unwritten, "off by inf"),
        (lambda: torch.arange(6).view(2, 3).float() * 1.00001, "off by"),
        (lambda: torch.arange(6).float(), "off by inf"),
        (_changing(), "other bits"),
        (_fails, "no such product"),
        (_fails_in_triton, "_OutOfResources: too much shared memory"),
    ],
    ids=["right", "unwritten", "inexact", "shape", "changing", "refused", "failed"],
)
def test_a_wrong_kernel_is_caught(call: Callable[[], Tensor], problem: str | None) -> None:
    check = judge(_case(call))
    assert bool(check.problems) == (problem is not None)
    assert problem is None or any(problem in found for found in check.problems)
    assert not torch.are_deterministic_algorithms_enabled()


def test_whole_numbers_have_no_excuse() -> None:
    almost = torch.arange(6).view(2, 3).float() * (1 + 2**-22)
    assert judge(_case(lambda: almost)).problems == ()
    assert judge(_case(lambda: almost, whole=True)).problems


def test_a_clone_shares_no_memory() -> None:
    crow_indices, col_indices = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 2]).int()
    packed = formats.pack(crow_indices, col_indices, torch.ones(2), 3, "n4")
    other, tensors = clone(packed), clone((packed.values, None))
    assert other.values.data_ptr() != packed.values.data_ptr() != tensors[0].data_ptr()
    assert (other.shape, other.kind) == (packed.shape, packed.kind)


class _Clock:
    """CUDA's events by a clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.launched = 0.0, ""
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.launched += name

        return run


@pytest.mark.parametrize("graphs", [True, False])
def test_a_race_takes_turns_and_divides_by_the_calls(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, captured = _Clock(monkeypatch), []
    monkeypatch.setattr(timing, "captured", lambda call: captured.append(call) or call)
    sides = {"a": [clock.call("a", 0.001), clock.call("A", 0.003)], "b": [clock.call("b", 0.05)]}
    times, replayed = timing.race(sides, Effort(rounds=3, burst_seconds=0.008), graphs)
    assert replayed == graphs
    assert {name: time.seconds for name, time in times.items()} == {
        "a": pytest.approx([0.002] * 3),
        "b": pytest.approx([0.05] * 3),
    }
    assert clock.launched.endswith("aAaAb" + "aAaAb" + "baAaA" + "aAaAb")  # warm, then three rounds
    assert len(captured) == (2 if graphs else 0)


def test_where_one_side_cannot_be_captured_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        before = clock.now
        call()
        if clock.now - before >= 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        raise AssertionError("a replay of one side and a call of the other were going to be compared")

    monkeypatch.setattr(timing, "captured", capture)
    sides = {"slow": [clock.call("s", 1)], "fast": [clock.call("f", 0.5)]}
    times, replayed = timing.race(sides, Effort(rounds=2, burst_seconds=0.1))
    assert times["fast"].seconds == (0.5, 0.5) and not replayed


def test_a_figure_is_over_the_fastest_of_the_others() -> None:
    times = {"ours": Timing((2.0, 2.0)), "dense": Timing((8.0, 8.0)), "other dense": Timing((4.0, 4.0))}
    assert filled(WANTED, Raced(times, {})).value == 2.0
    assert filled(WANTED, Raced({"ours": Timing((2.0,))}, {"dense": "dense: no"})).refused == "dense: no"
    assert filled(WANTED, Raced({"dense": Timing((2.0,))}, {})).refused == "there is no time of ours"


def _raises(error: Exception) -> Callable[[], Raced]:
    def measure() -> Raced:
        raise error

    return measure


@pytest.mark.parametrize(
    ("error", "refused", "wrong"),
    [
        (WrongResult("dx"), "wrong result: dx", True),
        (KernelError("no kernel"), "no kernel", False),
        (TypeError("no such argument"), "failed: TypeError: no such argument", True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"), "memory is too small: CUDA out of memory", False),
    ],
)
def test_what_cannot_be_timed_is_refused_and_the_rest_goes_on(
    error: Exception, refused: str, wrong: bool, tmp_path: Path
) -> None:
    sheet = Sheet(tmp_path / "part.json")
    times = {"ours": Timing((1.0,)), "dense": Timing((2.0,))}
    jobs = [Job((WANTED,), ("a",), _raises(error)), Job((WANTED,), ("b",), lambda: Raced(times, {}))]
    work_through(jobs, sheet, Deadline.after(60))
    first, second = (figure for figure, _ in sheet.figures)
    assert (refused in str(first.refused), first.wrong, first.value) == (True, wrong, None)
    assert second.verdict == "met"
    assert len(json.loads(sheet.path.read_text())["figures"]) == 2
    work_through(jobs, sheet, Deadline.after(0))
    assert [figure.refused for figure, _ in sheet.figures[2:]] == [WAITED_OUT] * 2


def test_a_side_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sides = Sides()
    sides.offer("works", lambda: [lambda: None])
    sides.offer("fails", lambda: [lambda: torch.zeros(2) @ torch.zeros(3)])
    sides.offer("is not there", lambda: importlib.import_module("no_such_package"))
    sides.offer("says nothing", _raises(AttributeError()))
    assert list(sides.calls) == ["works"]
    assert sides.refused["fails"].startswith("fails: ")
    assert sides.refused["is not there"] == "is not there: No module named 'no_such_package'"
    assert sides.refused["says nothing"] == "says nothing: AttributeError"
    with pytest.raises(WrongResult):
        sides.offer("wrong", _raises(WrongResult("dx")))


def test_no_time_is_reported_of_a_kernel_whose_check_failed() -> None:
    figures = [
        asdict(replace(FIGURE, value=2.0, seconds=(2.0, 1.0))) | {"kernels": [k]} for k in ("good", "bad", "new")
    ]
    checks = [Check("good", "a", 0.0), Check("bad", "a", 0.0), Check("bad", "b", 0.1, ("off",))]
    good, bad, new = judged(figures, map(asdict, checks), expected=True)
    assert (good.value, good.seconds, good.verdict) == (2.0, (2.0, 1.0), "met")
    assert (bad.value, bad.seconds, bad.wrong) == (None, None, True)
    assert "bad, b: off" in str(bad.refused)
    assert (new.value, new.wrong) == (None, False)
    assert "was not checked" in str(new.refused)
    assert judged(figures[2:], [], expected=False)[0].value == 2.0


def test_every_bar_of_the_gpu_is_set_once() -> None:
    figures = [
        wanted.figure
        for part in command.TIMED
        for job in importlib.import_module(f"gpu.{part}").jobs(False, Effort(), torch.device("cpu"))
        for wanted in job.wanted
    ]
    places = [(figure.section, figure.row, figure.column) for figure in figures]
    assert len(places) == len(set(places))
    topk, expand, decode, tiles, live, step, layers = 3, 2, 5, 4, 1, 2 * 3, 2 * 3 * 4 * 2 + (4 + 3) * 4
    assert sum(figure.bar is not None for figure in figures) == topk + expand + decode + tiles + live + step + layers
    # What the table of the docs shows are figures of the run.
    assert {row.place for row in rows()} <= set(places)


SMALL_AUTOENCODER = (40, 3, 12, 24)


@pytest.fixture(params=["topk", "batch_topk"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> autoencoder.Step:
    monkeypatch.setattr(autoencoder, "DTYPE", torch.float64)
    monkeypatch.setattr(autoencoder, "waits_refused", nullcontext)
    autoencoder.drawn.cache_clear()
    torch.manual_seed(0)
    yield autoencoder.drawn(SMALL_AUTOENCODER, request.param, torch.device("cpu"))
    autoencoder.drawn.cache_clear()


def test_both_autoencoders_of_the_race_are_one_function(step: autoencoder.Step) -> None:
    autoencoder.check(step)
    counted = step.sae.tokens_since_fired.clone()
    step.sae.tokens_since_fired.zero_()
    for ours, dense in zip(step.ours(), step.dense(), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)
    assert torch.equal(step.sae.tokens_since_fired, 2 * counted) and bool(counted.any())


@pytest.mark.parametrize("mistake", ["forgets the bias", "one fewer", "another value"])
def test_a_wrong_autoencoder_is_not_timed(
    step: autoencoder.Step, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"topk": "encode_topk", "batch_topk": "encode_batch_topk"}[step.sae.activation]
    encode = getattr(nn.autoencoder, name)

    def wrong(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseRows:
        bias = bias + (0.5 * torch.arange(len(bias)).sin() if mistake == "forgets the bias" else 0)
        rows = encode(x, weight, bias, k - (mistake == "one fewer"))
        return rows.with_values(rows.values * (1 + 1e-9)) if mistake == "another value" else rows

    monkeypatch.setattr(nn.autoencoder, name, wrong)
    with pytest.raises(WrongResult):
        autoencoder.check(step)
