"""Many processes: the checks of `distributed_checks.py`, and `torchrun` as people start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import distributed_checks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "distributed.md"
CHECKS = list(distributed_checks.CHECKS)
# Four processes say nothing new of most checks: those whose sums have more terms, or whose shares are other ones.
OF_FOUR = [c for c in CHECKS if re.match("equals|gradient|other_connections|ranks_stay_alike RigL plain|run_", c)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[str]]:
    """What each of the processes said of a check: they are started once for all checks."""
    said: dict[int, list[dict[str, str]]] = {}

    def of(count: int, check: str) -> list[str]:
        if count not in said:
            said[count] = _start(count, tmp_path_factory.mktemp("ranks"), CHECKS if count == 2 else OF_FOUR)
        return [results.get(check, "not reached") for results in said[count]]

    return of


def _start(count: int, folder: Path, checks: list[str]) -> list[dict[str, str]]:
    command = [sys.executable, distributed_checks.__file__, str(folder), json.dumps(checks)]
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT / "tests")}
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(count)]
    for process in processes:
        process.wait(timeout=200)
    return [json.loads((folder / f"results-{count}-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcome: Callable[[int, str], list[str]], check: str) -> None:
    assert outcome(2, check) == ["", ""]


@pytest.mark.parametrize("check", OF_FOUR)
def test_four_processes(outcome: Callable[[int, str], list[str]], check: str) -> None:
    assert outcome(4, check) == [""] * 4
