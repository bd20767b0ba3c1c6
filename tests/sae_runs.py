"""What the tests of an autoencoder's runs share: a small run, one that watches it, and a cache of its own."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from offpath.studies.folder import RunFolder
from offpath.studies.sae import SaeConfig
from run_checks import Watcher

TINY = SaeConfig(data="synthetic", latents=128, k=8, epochs=2, batch_size=2000, seed=1)


class SaeWatcher(Watcher):
    """Also sees how activations are taken, and can stop that."""

    def __init__(self, stop_after_steps: int | None = None, stop_at_shard: int | None = None) -> None:
        super().__init__(stop_after_steps)
        self.shards: list[int] = []
        self.stop_at_shard = stop_at_shard

    def on_shard(self, done: int, total: int) -> None:
        self.shards.append(done)
        if done == self.stop_at_shard:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def numbers(path: Path) -> list[dict[str, Any]]:
    clock = {"train_seconds", "tokens_per_second", "step_seconds"}
    return [{k: v for k, v in record.items() if k not in clock} for record in RunFolder(path).metrics()]
