"""Downloading the files of a data set from its home."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from offpath.studies.data.errors import DataError, missing_wheel
from offpath.studies.data.locate import cache_dir, find_file
from offpath.studies.data.spec import ArchiveSpec, IdxSpec
from offpath.studies.data.verify import check_sha256, read_bytes, read_verified

TIMEOUT_SECONDS = 30


def fetch(spec: IdxSpec, data_dir: Path | None = None, progress: bool = False) -> Path:
    """Download the files of `spec` and return the folder that holds them.

    The folder is `<name>` in `data_dir`, or in the download cache; files that are there and intact are not
    downloaded again. `progress` writes a line per file to standard error. Raises `DataError` where the
    home does not answer, sends something else, or the folder cannot be written. Files enter the folder only
    once all of them are whole and verified.
    """
    parent = cache_dir() if data_dir is None else data_dir.expanduser()
    folder = parent / spec.name
    if _is_intact(spec, folder):
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, not in it: a rename within one file system is atomic, and even a killed
        # process leaves nothing that a later search could take for data.
        with TemporaryDirectory(prefix=f".{spec.name}-", dir=parent) as temporary:
            paths = [_download(spec, file_name, Path(temporary), progress) for file_name in spec.sha256]
            folder.mkdir(exist_ok=True)
            for path in paths:
                path.replace(folder / path.name)
    except OSError as error:
        raise DataError(f"to write {folder}", str(error), "name a writable folder with --data-dir DIR") from error
    return folder


def fetch_archive(spec: ArchiveSpec, data_dir: Path | None = None, progress: bool = False) -> Path:
    """Download the first archive of `spec` and return the folder that holds it, as `fetch` does for IDX files."""
    name, sha256 = next(iter(spec.sha256.items()))
    parent = cache_dir() if data_dir is None else data_dir.expanduser()
    folder, url = parent / spec.name, spec.home_url + name
    if (folder / name).is_file() and hashlib.sha256(read_bytes(folder / name, spec.next_step)).hexdigest() == sha256:
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{spec.name}-", dir=parent) as temporary:
            path = Path(temporary) / name
            _get(url, path, progress, spec.next_step)
            check_sha256(read_bytes(path, spec.next_step), sha256, url, f"try again later: {spec.next_step}")
            folder.mkdir(exist_ok=True)
            path.replace(folder / name)
    except OSError as error:
        raise DataError(f"to write {folder}", str(error), "name a writable folder with --data-dir DIR") from error
    return folder


def _is_intact(spec: IdxSpec, folder: Path) -> bool:
    for file_name, sha256 in spec.sha256.items():
        path = find_file(folder, file_name)
        if path is None:
            return False
        try:
            read_verified(path, sha256, str(path), spec.next_step)
        except DataError:
            return False
    return True


def _download(spec: IdxSpec, file_name: str, folder: Path, progress: bool) -> Path:
    path = folder / f"{file_name}.gz"
    url = f"{spec.home_url.rstrip('/')}/{path.name}"
    _get(url, path, progress, spec.next_step)
    read_verified(path, spec.sha256[file_name], url, f"try again later: {spec.next_step}")
    return path


def _get(url: str, path: Path, progress: bool, next_step: str) -> None:
    try:
        # Late: pooch brings an HTTP stack that only a download needs.
        import pooch
    except ImportError as error:
        raise missing_wheel("pooch", "it downloads data sets") from error
    if progress:
        print(f"downloading {url}", file=sys.stderr)
    try:
        pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS)(url, str(path), None)
    except OSError as error:
        # The HTTP stack's errors are OSErrors too.
        raise DataError(f"a download from {url}", str(error), f"try again later: {next_step}") from error
