"""The memory of a training run, measured in a process of its own.

A fresh process, because memory that an earlier run gave back to the allocator would not show. Run as a module it
reads a config from its argument and prints what it measured.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from offpath.cost import TrainingBytes, training_bytes
from offpath.nn import SparseLinear
from offpath.studies.config import RunConfig, RunError
from offpath.studies.data import load
from offpath.studies.folder import AnyConfig
from offpath.studies.resumable import Resumable
from offpath.studies.run import Run

STEPS = 5


@dataclass(frozen=True)
class Memory:
    """`peak` resident bytes that building the model and a few training steps add, and what is `kept` between steps."""

    peak: int
    kept: TrainingBytes


def training_memory(config: AnyConfig, threads: int, module: str = __name__) -> Memory:
    """Measure a few training steps of `config` in a process that holds torch and the data already: that of `module`.

    Linux only. Raises `RunError` when the process fails.
    """
    command = [sys.executable, "-m", module, json.dumps(config.to_json()), str(threads)]
    # A session of its own: Ctrl-C on the terminal is for the race, which waits the few seconds that this takes.
    finished = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"])[-1]
        raise RunError(f"expected to measure the peak memory, got: {reason}; the run itself is saved, try --resume")
    measured = json.loads(finished.stdout)
    return Memory(measured["peak"], TrainingBytes(**measured["kept"]))


def _measure(config: RunConfig) -> Memory:
    dataset = load(config.data, Path(config.data_dir) if config.data_dir else None)
    _warm_up()
    # With an update among the few steps: it is a part of training like the others.
    return measure(lambda: Run(replace(config, update_freq=min(config.update_freq, 2)), dataset))


def measure(make_run: Callable[[], Resumable]) -> Memory:
    """What making a run and a few of its steps add to this process."""
    ctypes.CDLL(None).malloc_trim(0)  # or the run would reuse what loading the data has freed
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    run = make_run()
    run.advance(STEPS)
    return Memory(resident_bytes("VmHWM") - before, training_bytes(run.model, run.optimizer))


def _warm_up() -> None:
    """A tiny network, the same for every run: the code that training touches is resident only once it has run."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), SparseLinear(8, 8))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.ones(64, 8)), torch.zeros(64, dtype=torch.long)).backward()
        optimizer.step()


def resident_bytes(field: str) -> int:
    """What /proc says of this process: `VmRSS`, resident now; `VmHWM`, the most so far. Raises `OSError`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(asdict(_measure(RunConfig.from_json(json.loads(sys.argv[1]))))))
