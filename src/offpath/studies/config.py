"""What a run is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from offpath import kernels
from offpath.studies.data import DATASETS
from offpath.studies.models import MODELS
from offpath.topology import DISTRIBUTIONS

# How the connections of a run change while it trains.
METHODS = ("static", "set", "rigl", "gmp", "mest")
# What the config of an older run does not say: its connections were static.
ADDED_LATER = {"method", "drop_fraction", "update_freq", "end_step"}
KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}


class RunError(Exception):
    """A run cannot start or go on; the message says what was expected, what came and the next step."""


def check_seed(seed: int) -> None:
    """Raise `RunError` for a seed that some generator does not take."""
    if not 0 <= seed < 2**32:
        raise RunError(f"expected a seed in [0, 2^32), got {seed}")


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete: the same config gives the same numbers on the same backend, ISA, threads and costs.

    The costs are those of the kernels, which are measured once on a machine.

    `sparsity` 0 trains the dense model. `method` says how the connections change: every `update_freq` steps before
    `end_step`, where "set", "rigl" and "mest" move `drop_fraction` of them; "gmp" starts with all connections and
    reaches `sparsity` at `end_step`. A run fixes an `end_step` of None when it starts, at three quarters of its steps.
    Raises `RunError` for a value that cannot be run, `KernelError` for a device that the sparse layers have no kernels
    for.
    """

    data: str = "mnist-5k"
    model: str = "mlp"
    sparsity: float = 0.9
    distribution: str = "uniform"
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    data_dir: str | None = None
    method: str = "static"
    drop_fraction: float = 0.3
    update_freq: int = 100
    end_step: int | None = None

    def __post_init__(self) -> None:
        for name, choice, known in (
            ("data", self.data, DATASETS),
            ("model", self.model, MODELS),
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("method", self.method, METHODS),
        ):
            if choice not in known:
                raise RunError(f"expected {name} to be one of {', '.join(known)}, got {choice!r}")
        if not 0 <= self.sparsity < 1:
            raise RunError(f"expected sparsity in [0, 1), got {self.sparsity}; 0 trains the dense model")
        if self.moves and self.sparsity == 0:
            raise RunError(
                f"expected a sparsity above 0 for method {self.method}, got 0; a dense model has no connections to move"
            )
        if not 0 < self.drop_fraction <= 1:
            raise RunError(f"expected drop_fraction in (0, 1], got {self.drop_fraction}")
        if self.end_step is not None and self.end_step < 1:
            raise RunError(f"expected end_step of at least 1, or none, got {self.end_step}")
        for name, count in (
            ("epochs", self.epochs),
            ("batch_size", self.batch_size),
            ("update_freq", self.update_freq),
        ):
            if count < 1:
                raise RunError(f"expected {name} of at least 1, got {count}")
        if not 0 < self.learning_rate < float("inf"):
            raise RunError(f"expected a positive, finite learning rate, got {self.learning_rate}")
        check_seed(self.seed)
        _check_device(self.device)
        if self.sparsity > 0:
            kernels.select(torch.device(self.device).type, torch.float32)  # or it would fail at the first step

    @property
    def moves(self) -> bool:
        """Whether connections change while the run trains."""
        return self.method != "static"

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """The config that `to_json` gave. Raises `RunError` for keys that this version does not know."""
        known = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(values, dict) or not known.keys() - ADDED_LATER <= values.keys() <= known.keys():
            raise RunError(f"expected a config with the keys {sorted(known)}, got {values!r}")
        for name, value in values.items():
            if not isinstance(value, KINDS[known[name]]) or isinstance(value, bool):
                raise RunError(f"expected {name} as {known[name]} in the config, got {value!r}")
        return cls(**values)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"expected a torch device such as cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"expected device cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(
            f"expected a CUDA device for {name!r}, but torch sees none here; offpath info says what "
            "is missing, or use --device cpu"
        )
