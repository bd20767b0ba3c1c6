"""Launches without a GPU: what reaches a driver that only remembers it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_launches() -> None:
    """In a process of its own, which believes in a GPU from then on."""
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / "recorded_launches.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, cwd=tests.parent, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
