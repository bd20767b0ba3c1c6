"""What is timed on a GPU: what a call reads of a layer, which sides are graphs, and what launches take."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from contenders import Refused
from gpu import autoencoder, jobs, layers, timing
from gpu.timing import Effort
from measure import Timing
from offpath import SparseLinear
from offpath.kernels.gpu import contest
from offpath.nn import PackedSparseLinear


def _packed(**options) -> PackedSparseLinear:
    return PackedSparseLinear.from_sparse(SparseLinear(300, 64, dtype=torch.bfloat16, sparsity=0.7), **options)


def test_copies_are_counted_by_what_a_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `slots` nor the forms that so many tokens do not read: they would make it too few for the cache."""
    tiled, few, small = _packed(tokens=40), _packed(tokens=4), _packed(tokens=4, prefer="memory")
    weight = 300 * 64 * 2
    for layer, tokens, expected in (
        (tiled, 8, tiled.packed.n_bytes),
        (tiled, 9, tiled.tiles.n_bytes),
        (tiled, 40, tiled.tiles.n_bytes),
        (tiled, 41, weight),
        (few, 4, few.packed.n_bytes),
        (few, 5, weight),
        (small, 5, small.packed.n_bytes),
        (nn.Linear(300, 64, dtype=torch.bfloat16), 1, weight + 64 * 2),
    ):
        assert layers.read_bytes(layer, tokens) == expected
    monkeypatch.setattr(layers, "copies_needed", lambda read_bytes: 3 if read_bytes == tiled.tiles.n_bytes else 99)
    assert len(layers.cold(tiled, 9)) == 3 and len(layers.cold(tiled, 8)) == layers.MOST_COPIES


def test_steps_of_graphs_are_said_to_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SimpleNamespace(dense=lambda: None, ours=lambda: None)
    monkeypatch.setattr(autoencoder, "drawn", lambda *_: step)
    monkeypatch.setattr(autoencoder, "check", lambda step: None)
    monkeypatch.setattr(autoencoder, "captured", lambda call: call)
    monkeypatch.setattr(jobs, "race", lambda calls, effort, graphs: (dict.fromkeys(calls, Timing((1.0,))), graphs))
    options = "topk", (8, 2, 4, 4), Effort(), torch.device("cpu")
    assert autoencoder._in_graphs(*options).replayed == {autoencoder.DENSE, autoencoder.OURS}
    assert autoencoder._eager(*options).replayed == frozenset()


@pytest.mark.parametrize(("problem", "refused"), [("it waits for the device", False), ("captures_underway", True)])
def test_a_capture_that_failed_makes_no_launches_of_later_graphs(
    problem: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure that is meant to be of graphs, and has a bar, would be judged by what launches take."""

    def fails(call: timing.Call) -> timing.Call:
        raise RuntimeError(f"torch says: {problem}")

    monkeypatch.setattr(timing, "captured", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls, tours = {"ours": [lambda: None]}, {"ours": 1}
    with pytest.raises(Refused, match="a capture that failed before") if refused else nullcontext():
        assert timing._captured(calls, tours) is None


def test_what_launches_take_is_hidden_behind_the_cache_that_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a host that takes as long as two calls of the tiles, and a write that takes as little as any."""
    us = 1e-6
    host = device = 0.0

    def enqueue(host_seconds: float, device_seconds: float) -> None:
        nonlocal host, device
        host += host_seconds
        device = max(device, host) + device_seconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            enqueue(2 * us, 0)
            self.at = device

        def synchronize(self) -> None:
            nonlocal host
            host = max(host, self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=16))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: enqueue(5 * us, 60 * us))
    calls = [lambda: enqueue(100 * us, 10 * us), lambda: enqueue(5 * us, 30 * us)]
    assert contest.cold_seconds(calls, torch.device("cpu")) == pytest.approx([10 * us, 30 * us])
