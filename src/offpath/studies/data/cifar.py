"""Reading CIFAR-10: its canonical archives, or one image file for each picture in folders named after the classes."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offpath.studies.data.errors import DataError, missing_wheel
from offpath.studies.data.raw import RawImages
from offpath.studies.data.verify import check_sha256, read_bytes

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_PARTS = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_PART = "test_batch"
SIDE = 32
PIXELS = 3 * SIDE * SIDE
JPEG = {".jpg", ".jpeg"}
IMAGES = JPEG | {".png"}
Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def read_archive(path: Path, sha256: str, next_step: str) -> RawImages:
    """Return CIFAR-10 from its python or binary `.tar.gz`, whose checksum is `sha256`.

    Raises `DataError` where the file cannot be read, has another checksum or lacks a part. Nothing of it is looked
    into before the checksum is right: the python archive holds pickles, which could run anything.
    """
    content = read_bytes(path, next_step)
    check_sha256(content, sha256, str(path), next_step)
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}

            def part(name: str) -> Part:
                found = files.get(name) or files[f"{name}.bin"]
                file = archive.extractfile(found)
                assert file is not None  # it is a plain file
                return _from_bin(file.read()) if found.name.endswith(".bin") else _from_pickle(file.read())

            train, test = _joined([part(name) for name in TRAIN_PARTS]), part(TEST_PART)
    except (KeyError, ValueError, EOFError, OSError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} to hold the six parts of CIFAR-10", f"{error!r}", next_step) from error
    return RawImages(*train, *test, max_pixel=255, source=str(path))


def read_pictures(path: Path, next_step: str) -> RawImages:
    """Return CIFAR-10 from a folder or a zip of `train/<class>/*` and `test/<class>/*`, `.png` or `.jpg`.

    Files are taken in the order of their names. The source says when they were JPEG, which is not quite the same data.
    Raises `DataError` for a class that is missing or unknown, or a file that is not an RGB image of 32 x 32.
    """
    try:
        pictures = dict(_in_zip(path) if path.is_file() else _in_folder(path))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} to be a readable folder or zip", str(error), next_step) from error
    if not pictures:
        raise DataError(f"{path} to hold train/<class>/*.png or *.jpg", "no such file", next_step)
    train, test = (_split(path, pictures, name, next_step) for name in ("train", "test"))
    lossy = any(name.suffix.lower() in JPEG for name in pictures)
    return RawImages(*train, *test, max_pixel=255, source=f"{path} (JPEG)" if lossy else str(path))


def _from_bin(content: bytes) -> Part:
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return _channels_last(rows[:, 1:]), rows[:, 0]


def _from_pickle(content: bytes) -> Part:
    batch: dict[bytes, Any] = pickle.loads(content, encoding="bytes")
    return _channels_last(np.asarray(batch[b"data"], dtype=np.uint8)), np.asarray(batch[b"labels"], dtype=np.uint8)


def _channels_last(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _joined(parts: list[Part]) -> Part:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _in_zip(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if PurePosixPath(name).suffix.lower() in IMAGES:
                yield PurePosixPath(name), archive.read(name)


def _in_folder(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in IMAGES:
            yield PurePosixPath(file.relative_to(path).as_posix()), file.read_bytes()


def _split(path: Path, pictures: dict[PurePosixPath, bytes], split: str, next_step: str) -> Part:
    chosen = {name: content for name, content in pictures.items() if name.parts[-3:-2] == (split,)}
    found = {name.parts[-2] for name in chosen}
    if found != set(CLASSES):
        raise DataError(
            f"{path} to have the folders {', '.join(CLASSES)} in {split}",
            f"missing: {sorted(set(CLASSES) - found)}, unknown: {sorted(found - set(CLASSES))}",
            next_step,
        )
    images = np.stack([_pixels(path, name, content, next_step) for name, content in chosen.items()])
    return images, np.array([CLASSES.index(name.parts[-2]) for name in chosen], dtype=np.uint8)


def _pixels(path: Path, name: PurePosixPath, content: bytes, next_step: str) -> NDArray[np.uint8]:
    try:
        # Late: only pictures need it.
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise missing_wheel("pillow", "it reads image files") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{name} in {path} to be a whole image", str(error), next_step) from error
    if pixels.shape != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise DataError(f"{name} in {path} to be RGB of {SIDE} x {SIDE}", f"shape {pixels.shape}", next_step)
    return pixels
