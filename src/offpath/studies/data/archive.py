"""Finding a data set that is one archive, or pictures in folders."""

from __future__ import annotations

import os
from pathlib import Path

from offpath.studies.data.errors import DataNotFoundError
from offpath.studies.data.locate import DATA_DIR_VARIABLE, cache_dir
from offpath.studies.data.raw import RawImages
from offpath.studies.data.spec import ArchiveSpec


def read_archive_set(spec: ArchiveSpec, data: Path | None = None) -> RawImages:
    """Return the images of `spec` from `data`: an archive, a zip or folder of pictures, or a folder that holds one.

    Without `data`, the folder that OFFPATH_DATA names and the download cache are searched. Raises `DataNotFoundError`
    with every place searched, and `DataError` for a broken file.
    """
    places = _places(data)
    for place in places:
        for folder in (place / spec.name, place):
            for name, sha256 in spec.sha256.items():
                if (folder / name).is_file():
                    return spec.read_archive(folder / name, sha256, spec.next_step)
            if (folder / "train").is_dir() and (folder / "test").is_dir():
                return spec.read_pictures(folder, spec.next_step)
        if place.is_file():
            if place.suffix == ".zip":
                return spec.read_pictures(place, spec.next_step)
            sha256 = spec.sha256.get(place.name, next(iter(spec.sha256.values())))
            return spec.read_archive(place, sha256, spec.next_step)
    raise DataNotFoundError(
        expected=f"{spec.name} as {' or '.join(spec.sha256)}, or as train/<class>/* and test/<class>/* images",
        got=f"none in {', '.join(map(str, places))}",
        next_step=spec.next_step,
    )


def _places(data: Path | None) -> list[Path]:
    if data is not None:
        return [data.expanduser()]
    from_environment = os.environ.get(DATA_DIR_VARIABLE)
    return [*([Path(from_environment).expanduser()] if from_environment else []), cache_dir()]
