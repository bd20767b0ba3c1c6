"""The memory of an autoencoder's training; run as a module it reads a config from its argument and prints it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from offpath.studies.memory import Memory, measure, training_memory
from offpath.studies.sae.activations import Activations, load
from offpath.studies.sae.config import SaeConfig
from offpath.studies.sae.run import SaeRun


def sae_memory(config: SaeConfig) -> Memory:
    """Measure a few steps of `config` in a fresh process. Linux only. Raises `RunError` when it fails."""
    return training_memory(config, torch.get_num_threads(), __name__)


def _measure(config: SaeConfig) -> Memory:
    data = load(config)
    assert data is not None  # nobody stops it
    # A tiny run first: the code that training touches is resident only once it has run.
    some = Activations(data.train[:64].clone(), data.test[:64], data.mean, data.source)
    SaeRun(SaeConfig(latents=32, k=4, batch_size=32, dense=config.dense, model=config.model), some).advance(2)
    return measure(lambda: SaeRun(config, data))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(asdict(_measure(SaeConfig.from_json(json.loads(sys.argv[1]))))))
