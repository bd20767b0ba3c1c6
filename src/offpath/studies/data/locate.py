"""Finding the folder that holds the IDX files of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from offpath.studies.data.errors import DataNotFoundError, missing_wheel
from offpath.studies.data.spec import IdxSpec

DATA_DIR_VARIABLE = "OFFPATH_DATA"


def cache_dir() -> Path:
    """Return the user's download cache; raises `DataNotFoundError` where pooch is not installed."""
    try:
        # Late: pooch brings an HTTP stack that sets found elsewhere do not need.
        import pooch
    except ImportError as error:
        raise missing_wheel("pooch", "it keeps the download cache") from error
    return Path(pooch.os_cache("offpath"))


def find_file(folder: Path, file_name: str) -> Path | None:
    """Return the file `file_name` in `folder`, compressed or plain, or None."""
    # Compressed first: that is what a download writes, so a download also mends a broken plain file.
    for path in (folder / f"{file_name}.gz", folder / file_name):
        if path.is_file():
            return path
    return None


def locate(spec: IdxSpec, data_dir: Path | None = None) -> Path:
    """Return the first searched folder that holds all files of `spec`.

    With `data_dir`, only `data_dir/<name>` and `data_dir` are searched; without it, the same two in the
    folder that OFFPATH_DATA names, then the set's system folders, then the download cache. Raises
    `DataNotFoundError` with every folder searched and what it lacks.
    """
    searched: list[str] = []
    for folder in _folders(spec, data_dir):
        missing = [file_name for file_name in spec.sha256 if find_file(folder, file_name) is None]
        if not missing:
            return folder
        reason = f"lacks {', '.join(missing)}" if folder.is_dir() else "no such folder"
        searched.append(f"{folder} ({reason})")
    raise DataNotFoundError(
        expected=f"the IDX files of {spec.name} ({', '.join(spec.sha256)}; plain or .gz) in one folder",
        got=f"none of these folders has them all: {'; '.join(searched)}",
        next_step=spec.next_step,
    )


def _folders(spec: IdxSpec, data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield from _folder_and_subfolder(data_dir, spec.name)
        return
    if from_environment := os.environ.get(DATA_DIR_VARIABLE):
        yield from _folder_and_subfolder(Path(from_environment), spec.name)
    yield from spec.system_dirs
    yield cache_dir() / spec.name


def _folder_and_subfolder(folder: Path, name: str) -> tuple[Path, Path]:
    # The subfolder first: sets share their file names, so only it says which set the files are.
    folder = folder.expanduser()
    return folder / name, folder
