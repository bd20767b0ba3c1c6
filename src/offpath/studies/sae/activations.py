"""Activations to train on: taken from the transformer once, kept beside the measured costs, and read from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from offpath.kernels.measured import cache_folder
from offpath.studies.config import RunError
from offpath.studies.data.errors import DataError
from offpath.studies.files import write_whole
from offpath.studies.interrupt import StopRequest
from offpath.studies.sae import minilm
from offpath.studies.sae.config import SaeConfig
from offpath.studies.sae.text import read_text, text_sha256

WINDOW_TOKENS = 126  # with its two marks, the 128 that the model was trained with
SHARD_WINDOWS = 64
TEST_SHARE = 0.1
# Of "synthetic": each sample sums a few of many directions, some of them often and most of them rarely.
SYNTHETIC = {"d_model": 64, "directions": 256, "per_sample": 8, "samples": 20_000}


@dataclass(frozen=True)
class Activations:
    """Samples [n, d_model] float32, divided by the standard deviation of the training part around its `mean`.

    `text_sha256` is that of the text that they were taken from.
    """

    train: Tensor
    test: Tensor
    mean: Tensor
    source: str
    text_sha256: str | None = None


def load(
    config: SaeConfig, on_shard: Callable[[int, int], None] = lambda done, total: None, stop: StopRequest | None = None
) -> Activations | None:
    """The activations that `config` asks for; None where `stop` was made before all had been taken.

    Those of a transformer are taken once and kept as float16, in `OFFPATH_CACHE_DIR` or else the user's cache;
    `on_shard(done, total)` is told of every part. What is there is not taken again. Raises `DataError`, or `RunError`
    such as for a text that is not the one whose `text_sha256` is in `config`.
    """
    sha256 = None
    if config.data == "synthetic":
        samples, source = _synthetic(), "made here: sums of 8 of 256 random directions of 64 dimensions"
    else:
        text, place = read_text(config.data, Path(config.data_dir) if config.data_dir else None)
        sha256 = text_sha256(text)
        if config.text_sha256 not in (None, sha256):
            raise RunError(
                f"expected the text that the run was started on, of sha256 {config.text_sha256}, got {sha256} in "
                f"{place}; bring that text back, name its file with --data-dir, or start a new run with another --out"
            )
        try:
            folder = cache_folder() / "activations" / _fingerprint(text, config.layer)
        except FileNotFoundError as error:
            raise DataError("a folder to keep activations in", str(error), "name one in OFFPATH_CACHE_DIR") from error
        taken = _take(text, config.layer, folder, on_shard, stop or StopRequest())
        if taken is None:
            return None
        samples, source = taken, f"layer {config.layer} of all-MiniLM-L6-v2 on {place}"
    held_back = max(2, int(TEST_SHARE * len(samples)))
    train, test = samples[:-held_back].float(), samples[-held_back:].float()
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    return Activations(train.div_(scale), test.div_(scale), mean / scale, source, sha256)


def _fingerprint(text: str, layer: int) -> str:
    asked = json.dumps([minilm.PACKAGE, minilm.version(), layer, WINDOW_TOKENS, SHARD_WINDOWS])
    return hashlib.sha256((asked + text).encode()).hexdigest()[:16]


def _take(
    text: str, layer: int, folder: Path, on_shard: Callable[[int, int], None], stop: StopRequest
) -> Tensor | None:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        count = folder / "shards.json"
        shards = _shards(folder, _count(count))
        if not shards or not all(path.exists() for path in shards):
            encode, activations = minilm.load(layer)
            ids = torch.tensor(encode(text))
            windows = ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS).split(SHARD_WINDOWS)
            if len(ids) < 10 * WINDOW_TOKENS:
                raise DataError(f"a text of at least {10 * WINDOW_TOKENS} tokens", f"{len(ids)}", "name another file")
            for done, (path, some) in enumerate(zip(_shards(folder, len(windows)), windows, strict=True)):
                if stop.made:
                    return None
                on_shard(done, len(windows))
                if not path.exists():
                    values = activations(some).flatten(0, 1).half().numpy()
                    write_whole(path, partial(np.save, arr=values))
            write_whole(count, lambda file: file.write(str(len(windows)).encode()))
        return torch.from_numpy(np.concatenate([_read(p) for p in _shards(folder, _count(count))]))


def _count(path: Path) -> int:
    """How many shards there are; 0 where nobody has written it down, or what was written is broken."""
    try:
        count = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0
    return count if isinstance(count, int) and count > 0 else 0


def _shards(folder: Path, count: int) -> list[Path]:
    return [folder / f"{number:05}.npy" for number in range(count)]


def _read(path: Path) -> np.ndarray:
    try:
        values = np.load(path)
        if values.ndim != 2 or values.shape[1] != minilm.D_MODEL or values.dtype != np.float16:
            raise ValueError(f"{values.dtype} {values.shape}")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"activations in {path}", str(error), "delete that file; they are taken again") from error
    return values


def _synthetic() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(SYNTHETIC["directions"], SYNTHETIC["d_model"], generator=generator)
    directions = torch.nn.functional.normalize(directions)
    rates = 1 / torch.arange(1, SYNTHETIC["directions"] + 1)  # Zipf's law
    which = torch.multinomial(
        rates.expand(SYNTHETIC["samples"], -1), SYNTHETIC["per_sample"], replacement=False, generator=generator
    )
    sizes = 0.5 + torch.rand(which.shape, generator=generator)
    return torch.einsum("sf,sfd->sd", sizes, directions[which])
