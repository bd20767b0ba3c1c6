"""Code in a process of its own, whose memory nobody else has touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

_PEAK_BYTES = """
def peak_bytes():
    # Not ru_maxrss: a process that Python starts inherits the peak of the one that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
"""


def environment() -> dict[str, str]:
    """This process's, with no choice of a backend."""
    return {k: v for k, v in os.environ.items() if not k.startswith("OFFPATH_") or k == "OFFPATH_CACHE_DIR"}


def numbers_of(code: str) -> list[int]:
    """The whole numbers that `code` prints; it may call `peak_bytes()`, the most memory that it has had resident."""
    command = [sys.executable, "-c", _PEAK_BYTES + code]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def run_tests(files: Sequence[str], *options: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """Files of this folder in a pytest of their own, on one thread. Raises `AssertionError` with what it says."""
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *(str(tests / f) for f in files)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)} | environment,
        cwd=tests.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


_FORKS = """
import json, os, sys, tempfile, traceback, torch, offpath
code, environments = json.load(sys.stdin)
outcomes = []
for environment in environments:
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        status = 0
        try:
            exec(code)
        except Exception:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes.append([status, *(os.pread(file.fileno(), 2**20, 0).decode() for file in files)])
print(json.dumps(outcomes))
"""


def outcomes_under(environments: list[dict[str, str]], code: str) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of `code` under each environment, in forks of one process that has imported torch
    and offpath, which takes seconds."""
    given = json.dumps([code, environments])
    command = [sys.executable, "-c", _FORKS]
    made = subprocess.run(command, input=given, env=environment(), capture_output=True, text=True, check=True)
    return [(status, out, errors) for status, out, errors in json.loads(made.stdout)]
