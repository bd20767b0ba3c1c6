"""compute-sanitizer over the checks on small shapes: memcheck and racecheck, each after a mistake that it must find."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu.part import CUDA_GROUPS, GROUPS
from gpu.processes import last_words
from gpu.sheet import read_json

TOOLS = ("memcheck", "racecheck")
# What is run side by side: Triton's kernels, which take long to compile, and the others.
HALVES = tuple(name for name in GROUPS if name not in CUDA_GROUPS), CUDA_GROUPS
FOUND = 99  # the exit status by which compute-sanitizer says that it found something
KEPT_LINES = 12
START_SECONDS = 20  # of Python, torch and CUDA, until a part's own clock runs


def find() -> str | None:
    """The program, if it is installed."""
    beside_nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside_nvcc) if beside_nvcc.exists() else None)


def sanitize(seed: int, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What each tool said, or why it did not run; side by side: most of their time is starting and compiling."""
    program = find()
    if program is None:
        return {tool: {"ran": False, "reason": "compute-sanitizer is not installed"} for tool in TOOLS}
    with ThreadPoolExecutor(len(TOOLS) * (1 + len(HALVES))) as pool:
        planted = {tool: pool.submit(_planted, program, tool, seconds, environment) for tool in TOOLS}
        halves = {
            tool: [pool.submit(_checked, program, tool, half, seed, seconds, environment) for half in HALVES]
            for tool in TOOLS
        }
        return {tool: planted[tool].result() | joined([half.result() for half in halves[tool]]) for tool in TOOLS}


def joined(halves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What both halves say together: errors before anything else, and nothing found only if both have run."""
    for telling in (lambda half: half["ran"] and not half["clean"], lambda half: not half["ran"]):
        for half in halves:
            if telling(half):
                return dict(half)
    return {
        "ran": True,
        "clean": True,
        "cases": sum(half["cases"] for half in halves),
        "finished": all(half["finished"] for half in halves),
        "lines": [line for half in halves for line in half["lines"]],
    }


def summary(found: Mapping[str, Any]) -> str:
    """One line for the page."""
    if not found["ran"]:
        return f"not run: {found['reason']}"
    if not found["clean"]:
        return f"exit status {found['status']}, after {found['cases']} cases"
    early = "" if found["finished"] else ", then its time ran out"
    planted = "it found the planted mistake" if found["found_planted"] else "BUT NOT THE PLANTED MISTAKE EITHER"
    return f"nothing found in {found['cases']} cases{early}; {planted}"


def _planted(program: str, tool: str, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    status, output = _run([program, "--tool", tool, *_OPTIONS], ["-m", "gpu.planted", tool], seconds, environment)
    return {"found_planted": status == FOUND, "planted": _last(output)}


def _checked(
    program: str, tool: str, groups: Sequence[str], seed: int, seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "checks.json"
        part = ["-m", "gpu.part", "checks", str(made), "--scale", "small", "--seed", str(seed)]
        part += ["--seconds", str(seconds), "--groups", *groups]
        tools = [program, "--tool", tool, *_OPTIONS]
        status, output = _run([*tools, *_without_torch(program)], part, seconds + START_SECONDS, environment)
        if not made.exists() and time.monotonic() - begun < START_SECONDS:  # it may not know the option
            status, output = _run(tools, part, seconds, environment)
        sheet = read_json(made) if made.exists() else {"checks": [], "finished": False}
    if status is None or not sheet["checks"]:
        return {"ran": False, "reason": "its time ran out" if status is None else _last(output)}
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    return {
        "ran": True,
        "clean": status == 0,
        "status": status,
        "cases": len(sheet["checks"]),
        "finished": sheet["finished"],
        "lines": lines[:KEPT_LINES] + lines[-1:],
    }


_OPTIONS = ("--error-exitcode", str(FOUND), "--print-limit", "10")


def _without_torch(program: str) -> tuple[str, ...]:
    """Leaves out what was compiled from C++, whose names are mangled: torch's own kernels, most of the time."""
    text = subprocess.run([program, "--help"], capture_output=True, text=True, errors="replace", check=False).stdout
    option = next((name for name in ("--kernel-name-exclude", "--kernel-regex-exclude") if re.search(name, text)), None)
    return (option, "kns=_Z") if option else ()


def _run(
    tool: Sequence[str], python: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    # Each tensor in memory of its own: inside of torch's large blocks, no access is out of bounds.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        [*tool, sys.executable, *python],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):  # it may just have ended
            os.killpg(process.pid, signal.SIGKILL)
        return None, last_words(process)
    return process.returncode, output


def _last(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "no output"
