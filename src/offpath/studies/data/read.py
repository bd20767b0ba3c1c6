"""Reading the four IDX files of a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offpath.studies.data.errors import DataNotFoundError
from offpath.studies.data.idx import parse_idx
from offpath.studies.data.locate import find_file, locate
from offpath.studies.data.raw import RawImages
from offpath.studies.data.spec import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, IdxSpec
from offpath.studies.data.verify import read_verified


def read_idx_set(spec: IdxSpec, data_dir: Path | None = None) -> RawImages:
    """Return the images of `spec` from the folder that `locate` finds.

    Raises `DataNotFoundError` where no folder has the files, `DataError` where one is corrupt.
    """
    folder = locate(spec, data_dir)
    return RawImages(
        train_images=_read(spec, folder, TRAIN_IMAGES, dimensions=3),
        train_labels=_read(spec, folder, TRAIN_LABELS, dimensions=1),
        test_images=_read(spec, folder, TEST_IMAGES, dimensions=3),
        test_labels=_read(spec, folder, TEST_LABELS, dimensions=1),
        max_pixel=255,
        source=str(folder),
    )


def _read(spec: IdxSpec, folder: Path, file_name: str, dimensions: int) -> NDArray[np.uint8]:
    path = find_file(folder, file_name)
    if path is None:
        raise DataNotFoundError(f"{file_name} in {folder}", "it has just been removed", spec.next_step)
    # Not "delete it": another set has files of the same names, and this may be an intact one of those.
    next_step = f"name a folder with an intact {spec.name}: {spec.next_step}"
    content = read_verified(path, spec.sha256[file_name], str(path), next_step)
    return parse_idx(content, dimensions, str(path), next_step)
