"""What an update of the topology costs: one 768 -> 3072 layer at 90 %, with Adam, batch 512.

Run with: .venv/bin/python benchmarks/topology.py
Prints medians. RigL's time is that beyond the product dy.T @ x itself, which is measured in turns with it. The last
lines are what the first training step after an update pays for new plans.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import offpath
from measure import machine_line
from offpath import SparseLinear
from offpath.topology import Topology

IN_FEATURES, OUT_FEATURES, BATCH, SPARSITY = 768, 3072, 512, 0.9
ROUNDS = 21
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


def main() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(BATCH, IN_FEATURES, requires_grad=True), torch.randn(BATCH, OUT_FEATURES)
    print(machine_line())
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
        print(
            f"{name:<5} update {beyond:6.1f} ms (bar {bar}, rival {rival})"
            + (f", with the product {update:.1f} ms" if name == "RigL" else "")
        )
        print(f"{'':<5} training step {following:6.1f} ms, the first after an update {first:6.1f} ms")


if __name__ == "__main__":
    main()
