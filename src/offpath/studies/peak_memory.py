"""The peak memory of a training run, measured in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from offpath.studies.config import RunConfig
from offpath.studies.data import load
from offpath.studies.run import Run

STEPS = 5


def peak_memory_bytes(config: RunConfig, threads: int) -> int:
    """Peak resident bytes that building the model and a few training steps add to a process with torch and the data.

    A fresh process, because memory that an earlier run gave back to the allocator would not show. Linux only.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, config, threads).result()


def _measure(config: RunConfig, threads: int) -> int:
    torch.set_num_threads(threads)
    dataset = load(config.data, Path(config.data_dir) if config.data_dir else None)
    # A small run first: the code of torch that training touches is resident only once it has run.
    Run(replace(config, model="mlp-small"), dataset).advance(STEPS)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident_bytes("VmRSS")
    run = Run(config, dataset)
    run.advance(STEPS)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
