"""What is left to hear of a process of the run whose time is over."""

from __future__ import annotations

import subprocess

KILL_SECONDS = 5


def last_words(process: subprocess.Popen[str]) -> str:
    """What a process that has been killed wrote into its pipe, as far as it comes in a few seconds."""
    try:
        output, errors = process.communicate(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired as left:  # the driver does not let it go, or a child of it has the pipe
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
        process.poll()
        return (left.stdout or left.stderr or b"").decode(errors="replace")
    return output or errors or ""
