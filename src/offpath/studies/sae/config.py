"""What a run of a sparse autoencoder is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from offpath.studies.config import RunError, check_seed
from offpath.studies.sae.text import TINYSHAKESPEARE_SHA256

# Name on the command line: the activation of the autoencoder.
MODELS = {"sae": "topk", "sae-batch-topk": "batch_topk", "sae-jumprelu": "jumprelu"}
DATA = ("tinyshakespeare", "python-source", "synthetic")
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str | None": (str, type(None)),
}
# What configs did not have at first.
MOST_LATENTS = 2**31 - 1
ADDED_LATER = {"text_sha256"}


@dataclass(frozen=True)
class SaeConfig:
    """One run: the same config gives the same numbers on the same backend, ISA, threads and measured costs.

    `data` is a text whose activations are taken after transformer layer `layer`, or "synthetic", which has neither
    text nor transformer. `dense` computes the same autoencoder with every latent of every row. `text_sha256` is that of
    the text a run was started on, and None as long as nobody has read it. Raises `RunError` for a value that cannot be
    run.
    """

    data: str = "tinyshakespeare"
    model: str = "sae"
    latents: int = 6144
    k: int = 32
    layer: int = 3
    epochs: int = 5
    batch_size: int = 2048
    learning_rate: float = 1e-3
    seed: int = 0
    data_dir: str | None = None
    dense: bool = False
    text_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, choice, known in (("data", self.data, DATA), ("model", self.model, tuple(MODELS))):
            if choice not in known:
                raise RunError(f"expected {name} to be one of {', '.join(known)}, got {choice!r}")
        if self.data_dir is not None and self.data != "tinyshakespeare":
            raise RunError(
                f"expected --data-dir with --data tinyshakespeare only, whose text it names, got --data {self.data}; "
                "leave it out"
            )
        if not 1 <= self.latents <= MOST_LATENTS:
            raise RunError(
                f"expected from 1 to {MOST_LATENTS} latents, which an int32 index can name, got {self.latents}"
            )
        if not 1 <= self.k <= self.latents:
            raise RunError(f"expected k from 1 to the {self.latents} latents, got {self.k}")
        for name, count in (("epochs", self.epochs), ("layer", self.layer)):
            if count < 1:
                raise RunError(f"expected {name} of at least 1, got {count}")
        if self.batch_size < 2:
            raise RunError(f"expected batch_size of at least 2, got {self.batch_size}; one row has no variance")
        if not 0 < self.learning_rate < float("inf"):
            raise RunError(f"expected a positive, finite learning rate, got {self.learning_rate}")
        check_seed(self.seed)

    @property
    def data_name(self) -> str:
        """What a reader knows the data by: a text of the user's own by its file."""
        if self.data_dir is None or self.text_sha256 == TINYSHAKESPEARE_SHA256:
            return self.data
        return Path(self.data_dir).name

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SaeConfig:
        """The config that `to_json` gave. Raises `RunError` for anything else, a config of another model included."""
        known = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(values, dict) or not known.keys() - ADDED_LATER <= values.keys() <= known.keys():
            raise RunError(f"expected the config of an sae with the keys {sorted(known)}, got {values!r}")
        for name, value in values.items():
            if not isinstance(value, TYPES[known[name]]) or (isinstance(value, bool) and known[name] != "bool"):
                raise RunError(f"expected {name} as {known[name]} in the config, got {value!r}")
        return cls(**values)
