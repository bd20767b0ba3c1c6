"""What the run on a GPU reports and keeps, and how its parts, the sanitizers and the command end."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import gpu.__main__ as command
from gpu import processes, timing
from gpu.page import show
from gpu.part import PARTS
from gpu.pays import block, committed, is_whole, slug
from gpu.sanitizer import joined, sanitize, summary
from gpu.sheet import Check, report_text
from gpu.timing import Deadline
from verdicts import Figure

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FIGURE = Figure("Decoding", "8192 x 8192", "50%", bar=1.5)
CARD = {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 2**37, "l2_bytes": 2**26,
        "torch": "2.11.0", "triton": "3.6.0", "nvrtc": "13.0"}  # fmt: skip


def _content() -> dict:
    figure = replace(FIGURE, section="Decoding, 1 token, over the best dense bf16", value=1.6, spread=0.01)
    missed = replace(figure, column="60%", value=1.2)
    time = {"section": "s", "row": "r", "column": "c", "median_seconds": 5e-4}
    times = [time | {"side": "copy", "replayed": False}, time | {"row": "q", "side": "ours", "replayed": True}]
    ran = {"ran": True, "clean": True, "cases": 3, "finished": True, "found_planted": True, "planted": "", "lines": []}
    return {
        "card": CARD,
        "seed": 1,
        "quick": False,
        "parts": {"checks": {"status": "finished"}, "step": {"status": "its time ran out", "said": ["last words"]}},
        "sanitizer": {"memcheck": ran, "racecheck": {"ran": False, "reason": "not installed"}},
        "checks": [asdict(Check("decode_n4", "one", 1e-7)), asdict(Check("live", "two", 0.5, ("it is off",)))],
        "figures": [asdict(figure), asdict(missed)],
        "times": times,
    }


def test_the_page_has_everything() -> None:
    content = _content()
    page = show(content, [Figure(**figure) for figure in content["figures"]])
    for words in (
        "NVIDIA H200", "seed 1", "4.29 TB/s", "decode_n4: 1 of 1 cases right", "live: 0 of 1", "live, two: it is off",
        "memcheck: nothing found in 3 cases; it found the planted mistake", "racecheck: not run: not installed",
        "step: its time ran out", "last words", "1.60x ±1%", "bar 1.5 met", "bar 1.5 missed", "2 bars: 1 met, 1 missed",
        "timed with their launches, not from CUDA graphs, in s: r, c\n",
    ):  # fmt: skip
        assert words in page, words
    assert json.loads(report_text(content)) == json.loads(json.dumps(content))


def test_where_it_pays_says_what_is_measured_and_what_is_calculated() -> None:
    nothing = block({})
    assert "Nothing has been measured" in nothing
    assert "calculated: at best on an H200 |\n" in nothing
    found = block({slug(CARD): _content()})
    assert "| measured on NVIDIA H200 |" in found
    assert "| 8192 x 8192, 50% sparse, 1 token | 1.45x | 1.60x |" in found
    assert "| 8192 x 8192, 95% sparse, 1 token | 10.00x | not measured |" in found
    assert "bars/gpu-nvidia-h200.txt" in found


def test_only_a_whole_run_goes_into_the_page() -> None:
    whole = {"quick": False, "card": CARD, "parts": {name: {} for name in PARTS}}
    assert is_whole(whole)
    for change in ({"quick": True}, {"card": {}}, {"parts": {name: {} for name in PARTS[:-1]}}):
        assert not is_whole(whole | change)


def test_the_table_of_the_page_is_that_of_the_committed_reports() -> None:
    docs = BENCHMARKS.parent / "docs"
    table = block({path.stem: json.loads(path.read_text()) for path in committed(docs / "bars")})
    assert f"<!-- gpu -->\n{table}\n<!-- /gpu -->" in (docs / "gpu.md").read_text()


def test_a_sanitizer_is_believed_only_when_it_ran_and_finds_a_mistake() -> None:
    clean = {"ran": True, "clean": True, "status": 0, "cases": 2, "finished": True, "lines": []}
    planted = {"found_planted": True, "planted": ""}
    assert joined([clean, clean])["cases"] == 4
    assert "nothing found in 4 cases; it found" in summary(planted | joined([clean, clean]))
    assert "then its time ran out" in summary(planted | joined([clean, clean | {"finished": False}]))
    assert "exit status 99" in summary(
        planted | joined([{"ran": False, "reason": "x"}, clean | {"clean": False, "status": 99}])
    )
    assert "not run: x" in summary(planted | joined([clean, {"ran": False, "reason": "x"}]))
    assert "BUT NOT" in summary(planted | {"found_planted": False} | joined([clean, clean]))


FAKE_SANITIZER = """#!/bin/sh
if [ "$1" = --help ]; then echo "--kernel-name-exclude filter"; exit 0; fi
case "$*" in
*gpu.planted*) exit 99 ;;
*--kernel-name-exclude*) echo "unknown option"; exit 1 ;;
*racecheck*) echo "========= hazard"; status=99 ;;
*) echo "========= ERROR SUMMARY: 0 errors"; status=0 ;;
esac
while [ "$1" != checks ]; do shift; done
echo '{"checks": [{}, {}], "finished": true}' > "$2"
exit $status
"""


def test_both_tools_run_over_all_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_SANITIZER)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = sanitize(0, 20, dict(os.environ))
    assert summary(found["memcheck"]) == "nothing found in 4 cases; it found the planted mistake"
    assert summary(found["racecheck"]) == "exit status 99, after 2 cases"
    assert found["racecheck"]["lines"][0] == "========= hazard"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert summary(sanitize(0, 20, {})["memcheck"]) == "not run: compute-sanitizer is not installed"


def _fake_python(tmp_path: Path, then: str) -> str:
    """A program in the place of Python that writes what a part has written so far, and then fails in its own way."""
    written = {"finished": False, "facts": {}, "checks": [], "times": [],
               "figures": [asdict(replace(FIGURE, value=2.0)) | {"kernels": []}]}  # fmt: skip
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat > \"$4\" <<'END'\n{json.dumps(written)}\nEND\n{then}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("echo 'CUDA error' >&2; exit 7", "ended with status 7"),
        ("exec sleep 60", "its time ran out"),
        ("exit 0", "its time ran out"),
    ],
)
def test_what_a_part_wrote_before_it_failed_stays(
    then: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", _fake_python(tmp_path, then))
    monkeypatch.setattr(command, "missing", lambda: None)
    monkeypatch.setattr(command, "describe", lambda: CARD)
    monkeypatch.setattr(command, "START_SECONDS", 0.5 if "sleep" in then else 20)
    monkeypatch.setitem(command.BUDGETS, "decode", 0.1)
    report = tmp_path / "out" / "gpu.json"
    assert command.main(["--parts", "decode", "--json", str(report)]) == 1
    content = json.loads(report.read_text())
    assert content["parts"]["decode"]["status"] == status
    assert [figure["value"] for figure in content["figures"]] == [2.0]
    assert "2.00x" in report.with_suffix(".txt").read_text()


def test_a_process_that_does_not_end_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver does with a process that hangs in it, a child does here: the pipe stays open behind a kill."""
    child, ended = tmp_path / "child", tmp_path / "ended"
    then = f"{{ sleep 30; touch {ended}; }} & echo $! > {child}; echo 'last words' >&2; exec sleep 60"
    monkeypatch.setattr(sys, "executable", _fake_python(tmp_path, then))
    monkeypatch.setattr(command, "missing", lambda: None)
    monkeypatch.setattr(command, "describe", lambda: CARD)
    monkeypatch.setattr(command, "START_SECONDS", 0.5)
    monkeypatch.setattr(processes, "KILL_SECONDS", 0.2)
    monkeypatch.setitem(command.BUDGETS, "decode", 0.1)
    report = tmp_path / "gpu.json"
    assert command.main(["--parts", "decode", "--json", str(report)]) == 1
    assert not ended.exists(), "the run waited for it"
    os.kill(int(child.read_text()), signal.SIGKILL)
    part = json.loads(report.read_text())["parts"]["decode"]
    assert (part["status"], part["said"]) == ("its time ran out", ["last words"])


def _run(tmp_path: Path, seconds: float) -> command.Run:
    content = {"card": CARD, "seed": 1, "quick": False, "parts": {}}
    return command.Run(tmp_path, 1, False, Deadline.after(seconds), content, tmp_path / "out.json")


def test_a_run_whose_parts_all_hang_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, begun = [1000.0], []

    def hangs(run: command.Run, name: str, number: int, seconds: float, options: Sequence[str]) -> tuple[str, list]:
        begun.append(name)
        if number == 0:  # the others of a part hang beside it
            clock[0] += seconds + command.START_SECONDS + processes.KILL_SECONDS
        return command.TIMED_OUT, []

    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(command, "sanitize", lambda *_: {})
    monkeypatch.setattr(command.Run, "_child", hangs)
    run = _run(tmp_path, command.TOTAL_SECONDS)
    run.parts(command.PARTS)
    assert clock[0] - 1000 < 9 * 60
    parts = run.content["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("checks", *command.TIMED), "its time ran out"
    )
    assert "autoencoder" in begun and command.TIMED[-1] not in begun


def test_what_has_no_time_to_start_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "sanitize", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(command.Run, "_child", lambda *_: pytest.fail("started"))
    run = _run(tmp_path, command.START_SECONDS - 1)
    run.parts(("checks", "sanitizer", "decode"))
    late = {"seconds": 0.0, "status": "its time ran out"}
    assert json.loads(run.path.read_text())["parts"] == {"checks": late, "decode": late}
    assert "memcheck: not run: its time ran out" in run.path.with_suffix(".txt").read_text()


def test_a_sanitizer_that_cannot_start_does_not_cost_what_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise PermissionError("compute-sanitizer")

    monkeypatch.setattr(sys, "executable", _fake_python(tmp_path, "exit 0"))
    monkeypatch.setattr(command, "missing", lambda: None)
    monkeypatch.setattr(command, "describe", lambda: CARD)
    monkeypatch.setattr(command, "sanitize", fails)
    report = tmp_path / "gpu.json"
    command.main(["--parts", "sanitizer", "decode", "--json", str(report)])
    content = json.loads(report.read_text())
    assert [figure["value"] for figure in content["figures"]] == [2.0]
    assert "racecheck: not run: PermissionError: compute-sanitizer" in report.with_suffix(".txt").read_text()


def test_without_a_gpu_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "missing", lambda: "device: torch sees none")
    assert command.main(["--quick"]) == 2
    assert "needs an NVIDIA GPU: device: torch sees none" in capsys.readouterr().err
