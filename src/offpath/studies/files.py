"""Writing files so that a reader never sees half of one, and reading what holds the values of an object."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from offpath.studies.config import RunError


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill an open file beside `path`, then rename it there: `path` is the old file or the whole new one.

    Raises `RunError` when it cannot be written (a full disk, a folder without permission). The file beside has one
    name, so that what a killed process left is overwritten; processes that write the same file take turns.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _locked(beside) as file:
            try:
                file.truncate(0)
                write(file)
                file.flush()
                os.fsync(file.fileno())  # or a crash could leave the new name on unwritten blocks
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            beside.replace(path)
    except OSError as error:
        raise RunError(f"expected to write {path}, got: {error}; free space or choose another --out") from error


@contextmanager
def _locked(beside: Path) -> Iterator[IO[bytes]]:
    """`beside`, opened and this process's alone until it is closed."""
    while True:
        with beside.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had it before may have renamed it: then the lock is on a file of another name.
            if _is(beside, os.fstat(file.fileno())):
                yield file
                return


def _is(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), opened)
    except FileNotFoundError:
        return False


def refuse_other_report(folder: Path, own: str) -> None:
    """Raise `RunError` where `folder` has a report, and not the file `own` of the command that wants to write one."""
    if (folder / "report.html").exists() and not (folder / own).exists():
        raise RunError(
            f"expected a new folder, or one in which this command has begun, but {folder} holds the report of another; "
            "choose another --out"
        )


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as a whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def five_digits(value: Any) -> Any:
    """A JSON value with five digits of every number: more are noise, and make the file twice as large.

    >>> five_digits({"seconds": [0.123456789]})
    {'seconds': [0.12346]}
    """
    if isinstance(value, dict):
        return {name: five_digits(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [five_digits(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_json(
    path: Path, keys: Iterable[str] = (), next_step: str = "remove it, and it is made again"
) -> dict[str, Any]:
    """The values of a file. Raises `RunError` when it is broken, or lacks one of the `keys`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"expected a readable {path}, got: {error}; {next_step}") from error
    check_keys(values, keys, path, next_step)
    return dict(values)


def check_keys(values: Any, keys: Iterable[str], path: Path, next_step: str) -> None:
    """Raise `RunError` for what is no object with these keys, and came from the file at `path`."""
    if not isinstance(values, dict) or not {*keys} <= values.keys():
        raise RunError(f"expected {', '.join(sorted(keys)) or 'an object'} in {path}; {next_step}")
