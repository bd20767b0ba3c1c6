"""A follower with torch's own gradient scaler: a skipped step is none, and what was seen of it is forgotten."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

import offpath
from offpath import SparseLinear, topology as parts
from offpath.topology import TopologyUpdate
from offpath.trainers.follower import Follower


def _train(fused: bool, overflowing: set[int]) -> tuple[SparseLinear, Follower, list[TopologyUpdate]]:
    """Six passes of which the named ones overflow."""
    layer = SparseLinear(12, 10, density=0.4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, fused=fused)
    follower = Follower(offpath.RigL(layer, optimizer, update_freq=2, end_step=30), optimizer)
    scaler, updates = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000, backoff_factor=0.999), []
    generator = torch.Generator().manual_seed(1)
    for index in range(6):
        x = torch.randn(8, 12, generator=generator)
        loss = layer(x).square().mean() * (torch.inf if index in overflowing else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        follower.announce()
        scaler.step(optimizer)
        scaler.update()
        updates += follower.take_updates()
    return layer, follower, updates


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_not_counted_and_leave_nothing_behind(fused: bool) -> None:
    _, follower, updates = _train(fused, overflowing={0, 2})  # the third pass would have been watched
    assert follower.topology.step_count == 4
    assert [update.step for update in updates] == [2, 4] and all(update.grown for update in updates)


def test_rules_read_gradients_without_the_scale() -> None:
    """MEST adds gradients to weights; a scale that is a power of two loses no bit."""
    layers = []
    for enabled in (True, False):
        layer = SparseLinear(12, 10, density=0.4, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, fused=True)
        follower = Follower(offpath.MEST(layer, optimizer, update_freq=1), optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(layer(torch.ones(2, 12)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert follower.topology.step_count == 3
        layers.append(layer)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in layers), strict=True))


def test_a_follower_that_was_removed_follows_no_more() -> None:
    layer, follower, _ = _train(False, set())
    assert follower.topology.step_count == 6
    follower.topology.load_state_dict(follower.topology.state_dict() | {"step": 1})  # the next pass is watched
    assert layer._forward_hooks
    follower.remove()
    assert not layer._forward_hooks


def _compiles() -> bool:
    """Whether a compiled function reaches its backend at the moment."""
    reached = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        reached.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(reached)


def _watching(update_freq: int) -> tuple[Follower, Callable[[], None]]:
    """A follower of RigL, and a training step."""
    layer = SparseLinear(12, 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def step() -> None:
        layer(torch.ones(2, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Follower(offpath.RigL(layer, optimizer, update_freq=update_freq, end_step=30), optimizer), step


def test_compiled_models_run_uncompiled_as_long_as_any_follower_watches() -> None:
    (first, step_first), (second, step_second) = _watching(2), _watching(3)
    assert _compiles()
    step_first()
    step_second()
    step_second()
    assert first.topology.watching and second.topology.watching and not _compiles()
    step_first()  # the one that began to watch first leaves off first
    assert not first.topology.watching and not _compiles()
    step_second()
    assert _compiles()


def test_a_follower_that_is_lost_while_it_watches_leaves_compiled_models_compiled() -> None:
    follower, step = _watching(2)
    step()
    assert not _compiles()
    del follower, step
    gc.collect()
    assert _compiles()


def test_a_checkpoint_that_only_one_of_many_processes_could_resume_is_told_of() -> None:
    layer = SparseLinear(12, 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    recipe = parts.Recipe(
        "momentum",
        schedule=parts.Every(update_freq=2, end_step=10),
        drop=parts.drop.magnitude,
        grow=parts.grow.Momentum(momentum=0.9, steps=2),
        budget=parts.PerLayer(parts.Cosine(drop_fraction=0.3, end_step=10)),
    )
    follower = Follower(parts.Topology(layer, optimizer, recipe), optimizer)

    def step() -> None:
        layer(torch.ones(2, 12)).square().sum().backward()
        optimizer.step()

    step()
    follower.state_dict()  # one process: no warning, which pytest would raise
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.warns(UserWarning, match="cannot be resumed in many processes"):
            follower.state_dict()
        step()
        follower.state_dict()  # right after an update
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("trainer", "package"),
    [("lightning", "lightning.pytorch"), ("transformers", "transformers"), ("transformers", "accelerate")],
)
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, trainer: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"offpath.trainers.{trainer}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'offpath\[{trainer}\]'"):
        importlib.import_module(f"offpath.trainers.{trainer}")
