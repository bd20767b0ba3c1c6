"""Files of a data set in the IDX format, made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from offpath.studies.data.spec import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 0x08, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def tiny_files(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {
        TRAIN_IMAGES: idx_bytes(rng.integers(0, 256, (12, 3, 2))),
        TRAIN_LABELS: idx_bytes(np.arange(12) % 3),
        TEST_IMAGES: idx_bytes(rng.integers(0, 256, (6, 3, 2))),
        TEST_LABELS: idx_bytes(np.arange(6) % 3),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        (folder / file_name).write_bytes(content)
    return folder


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
