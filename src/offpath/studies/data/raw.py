"""Images as their source stores them, before standardisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RawImages:
    """Unscaled training and test images with their labels.

    Shapes and dtypes: images `[N, height, width]`, of colour `[N, height, width, channels]`, uint8 in `0..max_pixel`;
    labels `[N]` integer.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.integer]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.integer]
    max_pixel: int
    source: str
