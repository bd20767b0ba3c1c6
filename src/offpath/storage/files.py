"""Writing a file so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it there: `path` is the old file or the whole new one.

    The file beside has a name of its own, so that two processes that write at once do not write into one another's;
    the one that is renamed last stays. A symbolic link goes on pointing where it does. Raises `OSError`.
    """
    path = path.resolve()
    beside = path.with_name(f".offpath-{secrets.token_hex(8)}.tmp")
    try:
        beside.touch()  # so that it has the permissions of any new file, whatever `write` makes of it
        mode = (path if path.exists() else beside).stat().st_mode & 0o777
        write(beside)
        beside.chmod(mode)
        _sync(beside)  # or a crash could leave the new name on unwritten blocks
        beside.replace(path)
        with contextlib.suppress(OSError):  # not every file system knows how; the file itself is whole by now
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
