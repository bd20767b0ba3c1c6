"""What an update of the topology costs: the time of one in a 768 -> 3072 layer at 90 %, the memory in a huge layer.

Run with: .venv/bin/python benchmarks/topology.py [--out FILE]
Prints medians. RigL's time is that beyond the product dy.T @ x itself, which is measured in turns with it. The lines
below are what the first training step after an update pays for new plans. The memory is that of a whole process that
makes a 32768 x 32768 layer at 99.9 % and trains one step with RigL: where the kernels have been measured before, and
where it must measure them first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

import offpath
from measure import machine_line, print_and_write
from offpath import SparseLinear
from offpath.studies.memory import resident_bytes
from offpath.topology import Topology

IN_FEATURES, OUT_FEATURES, BATCH, SPARSITY = 768, 3072, 512, 0.9
ROUNDS = 21
HUGE_FEATURES, HUGE_SPARSITY, HUGE_BAR_MB = 32768, 0.999, 1000
# Name: (recipe, its settings, the bar in milliseconds, what the best rival takes).
RECIPES: dict[str, tuple[Callable[..., Topology], dict, int, int]] = {
    "SET": (offpath.SET, {}, 30, 550),
    "RigL": (offpath.RigL, {"end_step": 10**6}, 60, 1500),
}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _training_step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, dy: torch.Tensor) -> None:
    optimizer.zero_grad()
    layer(x).backward(dy)
    optimizer.step()


def _times() -> Iterator[str]:
    torch.manual_seed(0)
    x, dy = torch.randn(BATCH, IN_FEATURES, requires_grad=True), torch.randn(BATCH, OUT_FEATURES)
    for name, (make, settings, bar, rival) in RECIPES.items():
        layer = SparseLinear(IN_FEATURES, OUT_FEATURES, sparsity=SPARSITY)
        optimizer = torch.optim.Adam(layer.parameters())
        topology = make(layer, optimizer, update_freq=2, **settings)
        times: dict[str, list[float]] = {"update": [], "product": [], "first step": [], "next step": []}
        _training_step(layer, optimizer, x, dy)  # the kernels are measured here, once
        for _ in range(ROUNDS):
            times["first step"].append(_seconds(partial(_training_step, layer, optimizer, x, dy)))
            topology.step()  # none is due, and RigL watches the pass that follows
            times["next step"].append(_seconds(partial(_training_step, layer, optimizer, x, dy)))
            times["product"].append(_seconds(partial(torch.mm, dy.t(), x.detach())))
            times["update"].append(_seconds(topology.step))
        update, product, first, following = (statistics.median(seconds[1:]) * 1e3 for seconds in times.values())
        beyond = update - product if name == "RigL" else update
        yield f"{name:<5} update {beyond:6.1f} ms (bar {bar}, rival {rival})" + (
            f", with the product {update:.1f} ms" if name == "RigL" else ""
        )
        yield f"{'':<5} training step {following:6.1f} ms, the first after an update {first:6.1f} ms"


def _train_huge_layer() -> None:
    layer = SparseLinear(HUGE_FEATURES, HUGE_FEATURES, sparsity=HUGE_SPARSITY)
    optimizer = torch.optim.Adam(layer.parameters())
    topology = offpath.RigL(layer, optimizer, update_freq=1, end_step=100)
    _training_step(layer, optimizer, torch.randn(8, HUGE_FEATURES), torch.randn(8, HUGE_FEATURES))
    topology.step()
    print(resident_bytes("VmHWM") // 10**6)


def _memory() -> Iterator[str]:
    command = [sys.executable, __file__, "--huge-layer"]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OFFPATH_CACHE_DIR": cache}
        first, later = (
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
            for _ in range(2)
        )
    yield f"RigL  {HUGE_FEATURES} x {HUGE_FEATURES} at {HUGE_SPARSITY:.1%}, a step: {later} MB (bar {HUGE_BAR_MB})"
    yield f"{'':<5} where the kernels are measured first: {first} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/topology.txt"), help="default: %(default)s")
    parser.add_argument("--huge-layer", action="store_true", help="only print the peak, in MB, of one such process")
    options = parser.parse_args()
    if options.huge_layer:
        _train_huge_layer()
        return
    print_and_write(chain([machine_line()], _times(), _memory()), options.out)


if __name__ == "__main__":
    main()
