"""Code in a process of its own, whose memory nobody else has touched."""

from __future__ import annotations

import subprocess
import sys

_PEAK_BYTES = """
def peak_bytes():
    # Not ru_maxrss: a process that Python starts inherits the peak of the one that started it.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
"""


def numbers_of(code: str) -> list[int]:
    """The whole numbers that `code` prints; it may call `peak_bytes()`, the most memory that it has had resident."""
    command = [sys.executable, "-c", _PEAK_BYTES + code]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
