"""What `offpath crossover` is asked to measure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from offpath.cost.crossover import PRODUCTS
from offpath.studies.config import RunError, check_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A larger layer's weights alone would take gigabytes, in several copies.
MAX_FEATURES = 2**17
MAX_BATCH = 2**24
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class CrossoverConfig:
    """The grid: every shape (in_features, out_features) in every dtype at every sparsity and batch.

    One measurement on `device` takes about `budget_seconds`, longer where a few rounds of it do. Raises `RunError` for
    a value that cannot be measured.

    >>> CrossoverConfig(shapes=((64, 32),), batches=(1,)).points
    64
    """

    shapes: tuple[tuple[int, int], ...] = ((1024, 1024), (768, 3072), (4096, 4096))
    batches: tuple[int, ...] = (1, 16, 256, 1024)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    budget_seconds: float = 0.2
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("shapes", "batches", "dtypes", "sparsities"):
            values = getattr(self, name)
            if not values:
                raise RunError(f"expected at least one of {name}, got none")
            # In the order given, but the sparsities ascending: the table and the plot read from left to right.
            kept = tuple(dict.fromkeys(values))
            object.__setattr__(self, name, tuple(sorted(kept)) if name == "sparsities" else kept)
        for size in (size for shape in self.shapes for size in shape):
            if not 1 <= size <= MAX_FEATURES:
                raise RunError(f"expected layers of 1 to {MAX_FEATURES} features, got {size}")
        for batch in self.batches:
            if not 1 <= batch <= MAX_BATCH:
                raise RunError(f"expected batches from 1 to {MAX_BATCH}, got {batch}")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise RunError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise RunError(f"expected sparsities in [0, 1), got {sparsity}")
        if not 0 < self.budget_seconds < float("inf"):
            raise RunError(f"expected a positive, finite budget_seconds, got {self.budget_seconds}")
        check_seed(self.seed)
        if self.device not in DEVICES:
            raise RunError(f"expected a device among {', '.join(DEVICES)}, got {self.device!r}")

    @property
    def points(self) -> int:
        """How many measurements this asks for."""
        return len(self.shapes) * len(self.batches) * len(self.dtypes) * len(self.sparsities) * len(PRODUCTS)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CrossoverConfig:
        """The config that `to_json` gave."""
        shapes = tuple((inputs, outputs) for inputs, outputs in values["shapes"])
        lists = {name: tuple(values[name]) for name in ("batches", "dtypes", "sparsities")}
        return cls(**values | lists | {"shapes": shapes})


# Under a minute on two cores.
QUICK: dict[str, Any] = {
    "shapes": ((1024, 1024),),
    "batches": (1, 256),
    "sparsities": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    "budget_seconds": 0.1,
}
# On a GPU, layers as they are in language models, and the tokens of a prompt.
ON_GPU: dict[str, Any] = {
    "shapes": ((4096, 4096), (8192, 8192), (4096, 14336)),
    "batches": (1, 16, 256, 4096),
    "sparsities": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
}
QUICK_ON_GPU: dict[str, Any] = {
    "shapes": ((4096, 4096),),
    "batches": (1, 4096),
    "sparsities": (0.5, 0.8, 0.9, 0.95, 0.98),
    "budget_seconds": 0.05,
}


def grid_for(device: str, quick: bool) -> dict[str, Any]:
    """What is measured on a device where nothing else is asked for."""
    if device == "cuda":
        return QUICK_ON_GPU if quick else ON_GPU
    return QUICK if quick else {}


def shapes_from(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Shapes (in_features, out_features) from texts such as "768x3072". Raises `RunError` for anything else.

    >>> shapes_from(["768x3072"])
    ((768, 3072),)
    """
    shapes = []
    for text in texts:
        found = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
        if not found:
            raise RunError(f"expected a shape as INxOUT, such as 768x3072, got {text!r}")
        shapes.append((int(found[1]), int(found[2])))
    return tuple(shapes)
