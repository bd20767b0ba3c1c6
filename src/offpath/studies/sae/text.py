"""The texts whose activations are taken."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from offpath.studies.data.errors import DataError, DataNotFoundError
from offpath.studies.data.locate import DATA_DIR_VARIABLE

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FILE_NAMES = ("tinyshakespeare.txt", "input.txt")


def read_text(name: str, data_dir: Path | None) -> tuple[str, str]:
    """The text `name` ("tinyshakespeare" or "python-source") and where it came from.

    "python-source" is a file of Python itself, which is always there. `data_dir` is the file or its folder; without
    it, OFFPATH_DATA is looked at. Raises `DataError`, and its subclass `DataNotFoundError` with what to do.
    """
    path = Path(argparse.__file__) if name == "python-source" else _find(data_dir)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a text in {path}", str(error), "name the file with --data-dir FILE") from error


def text_sha256(text: str) -> str:
    """What tells a text from another, wherever its file lies."""
    return hashlib.sha256(text.encode()).hexdigest()


def _find(data_dir: Path | None) -> Path:
    place = data_dir or (Path(os.environ[DATA_DIR_VARIABLE]) if os.environ.get(DATA_DIR_VARIABLE) else None)
    if place is not None:
        place = place.expanduser()
        for path in (place, *(place / name for name in FILE_NAMES)):
            if path.is_file():
                return path
    raise DataNotFoundError(
        "a text file to take activations of",
        "no file was named" if place is None else f"none at {place}, and no {' or '.join(FILE_NAMES)} in it",
        f"name one with --data-dir FILE (tinyshakespeare is at {TINYSHAKESPEARE_URL}), or train on --data "
        "python-source",
    )
