"""The whole run: gpu/__init__.py says what it does."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu
from gpu.card import describe, missing
from gpu.check import INTERPRETED
from gpu.page import show
from gpu.part import GROUPS, PARTS, TIMED
from gpu.processes import last_words
from gpu.sanitizer import TOOLS, sanitize
from gpu.sheet import judged, read_json, report_text, write_text
from gpu.timing import Deadline

# Seconds of each part at most. Checks and sanitizer run side by side, the others one after the other.
BUDGETS = {
    "checks": 120,
    "sanitizer": 120,
    "topk": 60,
    "autoencoder": 60,
    "decode": 110,
    "tiles": 60,
    "expand": 50,
    "live": 50,
    "step": 60,
    "layers": 160,
}
QUICK_BUDGET = 45
TOTAL_SECONDS = 515
START_SECONDS = 20  # of a process, until its own clock runs: torch, CUDA, Triton
TIMED_OUT = "its time ran out"
LAST_LINES = 5
BENCHMARKS = Path(__file__).parent.parent
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every part ran to its end and no result was wrong; bars that are missed change nothing."""
    parser = argparse.ArgumentParser(prog="python -m gpu", description=(gpu.__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, as a smoke test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of the operands; default: another one in each run")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if INTERPRETED and parts != ["checks"]:
        print("make gpu: Triton's interpreter (TRITON_INTERPRET=1) is for --parts checks alone", file=sys.stderr)
        return 2
    if problem := missing():
        print(f"make gpu needs an NVIDIA GPU: {problem}", file=sys.stderr)
        return 2
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"card": describe(), "seed": seed, "quick": options.quick, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), seed, options.quick, Deadline.after(options.seconds), content, options.json)
        try:
            run.parts(parts)
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            run.save()
    print(options.json.with_suffix(".txt").read_text())
    wrong = any(check["problems"] for check in content["checks"]) or any(f["wrong"] for f in content["figures"])
    unfinished = [name for name, part in content["parts"].items() if part["status"] != "finished"]
    return 1 if wrong or unfinished else 0


class Run:
    """The parts, each in a process; after each of them the report is written anew."""

    def __init__(
        self, folder: Path, seed: int, quick: bool, deadline: Deadline, content: dict[str, Any], path: Path
    ) -> None:
        self.folder, self.seed, self.quick, self.deadline = folder, seed, quick, deadline
        self.content, self.path = content, path
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def parts(self, names: Sequence[str]) -> None:
        sanitizing: Future[dict[str, Any]] | None = None
        with ThreadPoolExecutor() as pool:
            if "sanitizer" in names and (seconds := self._budget("sanitizer")) > 0:
                sanitizing = pool.submit(sanitize, self.seed, seconds, self.environment)
            if "checks" in names:
                groups = [list(GROUPS)] if INTERPRETED else [[group] for group in GROUPS]
                scale = "tiny" if INTERPRETED else "small" if self.quick else "full"
                self._part("checks", [["--scale", scale, "--groups", *some] for some in groups])
            if "sanitizer" in names:
                self.content["sanitizer"] = _said_by(sanitizing)
        for name in TIMED:
            if name in names:
                self._part(name, [[]])

    def save(self) -> None:
        """The report of what there is so far."""
        sheets = {path.stem: read_json(path) for path in sorted(self.folder.glob("[a-z]*.json"))}
        checks = [check for sheet in sheets.values() for check in sheet["checks"]]
        figures = [figure for name in TIMED if f"{name}-0" in sheets for figure in sheets[f"{name}-0"]["figures"]]
        found = judged(figures, checks, expected="checks" in self.content["parts"])
        refused = {(f.section, f.row, f.column) for f in found if f.refused}
        self.content["checks"] = checks
        self.content["figures"] = [asdict(figure) | {"verdict": figure.verdict} for figure in found]
        self.content["times"] = [
            time
            for sheet in sheets.values()
            for time in sheet["times"]
            if (time["section"], time["row"], time["column"]) not in refused
        ]
        write_text(self.path, report_text(self.content))
        write_text(self.path.with_suffix(".txt"), show(self.content, found))

    def _budget(self, name: str) -> float:
        seconds = QUICK_BUDGET if self.quick else BUDGETS[name]
        return max(0.0, min(seconds, self.deadline.left_seconds - START_SECONDS))

    def _part(self, name: str, options: Sequence[Sequence[str]]) -> None:
        """Run the part once for each list of options, side by side."""
        seconds, left = self._budget(name), self.deadline.left_seconds
        if seconds <= 0:  # it could not even start
            self.content["parts"][name] = {"seconds": 0.0, "status": TIMED_OUT}
            self.save()
            return
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda one: self._child(name, one[0], seconds, one[1]), enumerate(options)))
        report: dict[str, Any] = {"seconds": round(left - self.deadline.left_seconds, 1)}
        problems = [problem for problem in said if problem]
        report["status"] = problems[0][0] if problems else "finished"
        if problems:
            report["said"] = [line for _, lines in problems for line in lines]
        self.content["parts"][name] = report
        self.save()

    def _child(self, name: str, number: int, seconds: float, options: Sequence[str]) -> tuple[str, list[str]] | None:
        """Why the process did not come to its end, and what it said last; None if it did."""
        made = self.folder / f"{name}-{number}.json"
        command = [sys.executable, "-m", "gpu.part", name, str(made), "--seconds", str(seconds), *options]
        command += ["--seed", str(self.seed), *(["--quick"] if self.quick else [])]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True, errors="replace")
        try:
            _, said = process.communicate(timeout=seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return TIMED_OUT, last_words(process).strip().splitlines()[-LAST_LINES:]
        if process.returncode:
            return f"ended with status {process.returncode}", said.strip().splitlines()[-LAST_LINES:]
        return None if read_json(made)["finished"] else (TIMED_OUT, [])


def _said_by(sanitizing: Future[dict[str, Any]] | None) -> dict[str, Any]:
    if sanitizing is None:
        return {tool: {"ran": False, "reason": TIMED_OUT} for tool in TOOLS}
    try:
        return sanitizing.result()
    except Exception as error:  # a tool that cannot even be started must not cost what is timed
        return {tool: {"ran": False, "reason": f"{type(error).__name__}: {error}"} for tool in TOOLS}


if __name__ == "__main__":
    sys.exit(main())
