"""The products on AArch64: compiled as they are shipped, and run by QEMU between pages that nobody may touch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent / "sanitize"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {COMPILER} and {EMULATOR} (Debian's packages g++-aarch64-linux-gnu and qemu-user)",
)
@pytest.mark.long
@pytest.mark.timeout(1200)  # two minutes on an idle machine, most of them the compiler's
def test_every_product_is_right() -> None:
    # An odd number, so that problems of both kinds of operands are among them.
    command = ["make", "-C", str(HARNESS), "-j2", "CROSS=aarch64-linux-gnu", "EVERY=9", "guards"]
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    finished = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    for expected in ("neon: checked", "neonbf16: checked", "every result is right"):
        assert expected in finished.stdout
