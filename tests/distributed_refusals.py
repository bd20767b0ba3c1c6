"""Processes that differ are refused, everywhere and before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

import offpath
from offpath import topology as parts
from offpath.nn import TopK
from offpath.topology import LayerView, Topology
from offpath.topology.distributed import Processes
from ranks import Wrapped, bits, check, count, my_rank, refused_everywhere, train_step
from topology_checks import model_of
from topology_oracle import integers


def _set(model: nn.Module, recipe: Callable[..., Topology] = offpath.SET, **settings: Any) -> tuple[Any, Topology]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return optimizer, recipe(model, optimizer, **{"update_freq": 2} | settings)


def _other_connections() -> None:
    model = model_of(seed=my_rank())
    parts.check_same_connections(model_of())
    parts.check_same_connections(nn.Linear(4, 4))
    with refused_everywhere("the same connections in all .* but rank 1.* from one seed in every process"):
        parts.check_same_connections(model)
    for wrapped in (model, Wrapped(model)):  # the wrapper has broadcast rank 0's digest with its values
        with refused_everywhere("the same connections in all .* but rank 1.* from one seed in every process"):
            _set(wrapped)


def _other_settings() -> None:
    with refused_everywhere("the same random state .* the same seed"):
        _set(model_of(), seed=my_rank())
    with refused_everywhere("the same recipe and layers"):
        _set(model_of(), drop_fraction=0.1 + 0.1 * my_rank())
    with refused_everywhere("the same recipe and layers"):
        _set(nn.Sequential(*list(model_of())[: 1 + 2 * (my_rank() == 0)]))


def _refused_update(
    message: str, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology, alike: bool = True
) -> None:
    """The update that is due is refused in every process, and model, optimizer and topology are as they were."""
    before = bits([model.state_dict(), optimizer.state_dict(), topology.state_dict()])
    with refused_everywhere(message, alike):
        topology.step()
    assert bits([model.state_dict(), optimizer.state_dict(), topology.state_dict()]) == before


def _weights_that_nobody_averaged() -> None:
    model = model_of()
    optimizer, topology = _set(model)
    train_step(model, optimizer, 1)
    topology.step()
    _refused_update("the same weights .* DistributedDataParallel, .* outside no_sync", model, optimizer, topology)


def _a_gradient_that_nobody_averaged() -> None:
    model = model_of()
    optimizer, topology = _set(model, offpath.MEST, update_freq=1)
    for layer in (model[0], model[2]):
        layer.values.grad = torch.randn(layer.nnz, generator=torch.Generator().manual_seed(my_rank()))
    _refused_update("the same decision", model, optimizer, topology)


def _other_steps() -> None:
    model = model_of()
    optimizer, topology = _set(model)
    topology.load_state_dict(topology.state_dict() | {"step": 1 if my_rank() else 3})
    _refused_update("the same steps", model, optimizer, topology)


def _saliency(layer: LayerView) -> Tensor:
    return (layer.values * layer.gradient).abs()


def _fails(layer: LayerView) -> Tensor:
    if my_rank() == 1:
        raise ZeroDivisionError("a rule of one's own")
    return layer.values.abs()


def _nan(layer: LayerView) -> Tensor:
    return layer.values.abs() if my_rank() != 1 else torch.full_like(layer.values, torch.nan)


def _odd_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[2].values]["odd"] = torch.zeros(3, 2)


def _other_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[2].topology_digest += 1


# Rule, what goes wrong in rank 1, and what it says of it.
FAILURES = {
    "NaN": (_nan, lambda model, optimizer: None, "TopologyError: .*without NaN"),
    "own error": (_fails, lambda model, optimizer: None, "ZeroDivisionError: a rule of one's own"),
    "no gradient": (_saliency, lambda model, optimizer: optimizer.zero_grad(), "expected values.grad, got None"),
    "state": (_saliency, _odd_state, "the state 'odd' of Adam"),
    "connections": (_saliency, _other_digest, "they have changed since"),
}


def _a_rank_that_fails(failure: str, grow: str) -> None:
    """The others hear of it, and do not wait for the timeout: not in the averages of growth by gradient either."""
    rule, spoil, message = FAILURES[failure]
    grow_rule = parts.grow.Gradient() if grow == "gradient" else parts.grow.random
    recipe = parts.Recipe("fails", parts.Every(1), rule, grow_rule, parts.PerLayer(parts.Constant(0.3)))
    model = model_of()
    wrapped = Wrapped(model)
    optimizer, topology = _set(wrapped, lambda m, o, **_: Topology(m, o, recipe))
    train_step(wrapped, optimizer, 1)
    if my_rank() == 1:
        spoil(model, optimizer)
    message = message if my_rank() == 1 else "TopologyError: .*same success .* rank 1 .* its own error says why"
    _refused_update(message, model, optimizer, topology, alike=False)


for function in (
    _other_connections, _other_settings, _weights_that_nobody_averaged, _a_gradient_that_nobody_averaged, _other_steps,
):  # fmt: skip
    check(function)
for failure in FAILURES:
    for grow in ("random", "gradient"):
        check(_a_rank_that_fails, failure, grow)


def _mutant(name: str) -> None:
    """A rank that decides for itself."""
    own = torch.Generator().manual_seed(my_rank())
    draw = LayerView.draw_free
    mutants: dict[str, tuple[type, str, Any]] = {
        "own gradient": (Processes, "average", lambda self, tensor: tensor),
        "own draw": (LayerView, "draw_free", lambda self, count: draw(replace(self, generator=own), count)),
    }
    kind, method, wrong = mutants[name]
    right = getattr(kind, method)
    setattr(kind, method, wrong)
    try:
        model = model_of()
        wrapped = Wrapped(model)
        recipe, settings = (offpath.SET, {}) if name == "own draw" else (offpath.RigL, {"end_step": 20})
        optimizer, topology = _set(wrapped, recipe, update_freq=1, **settings)
        train_step(wrapped, optimizer, 1)
        _refused_update(
            "the same decision in all .* may only read what is the same everywhere", model, optimizer, topology
        )
    finally:
        setattr(kind, method, right)


for name in ("own gradient", "own draw"):
    check(_mutant, name)


def _sizes_that_cannot_change() -> None:
    settings = {"end_step": 10, "final_sparsity": 0.9}
    model = model_of()
    with refused_everywhere("pass the DistributedDataParallel itself"):
        _set(model, offpath.GMP, **settings)
    with refused_everywhere("without static_graph=True"):
        _set(Wrapped(model, static_graph=True), offpath.GMP, **settings)
    with refused_everywhere("without a process_group"):
        _set(Wrapped(model, process_group=distributed.new_group(range(count()))), offpath.GMP, **settings)
    wrapped = Wrapped(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, parameters_as_bucket_view=True)
    offpath.SET(wrapped, optimizer)
    with refused_everywhere("ZeroRedundancyOptimizer with parameters_as_bucket_view=True, .* make it without"):
        offpath.GMP(wrapped, optimizer, **settings)
    own, _ = distributed.new_subgroups(1)
    _, topology = _set(model, offpath.GMP, process_group=own, seed=my_rank(), **settings)
    topology.step()
    assert topology.step().dropped > 0


check(_sizes_that_cannot_change)


def _fully_shard() -> None:
    """With fixed connections it trains to the numbers of one process; a topology refuses it, unless it is left out."""
    alone, sharded = model_of(torch.float64), model_of(torch.float64)
    fully_shard(sharded)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, sharded)]
    tokens = [integers((8, 12), seed) for seed in range(count())]
    for optimizer, model, mine in zip(
        optimizers, (alone, sharded), (torch.cat(tokens), tokens[my_rank()]), strict=True
    ):
        model(mine).square().mean().backward()
        optimizer.step()
    for a, b in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(b.full_tensor(), a.detach())
    for recipe in (offpath.SET, offpath.Static):
        with refused_everywhere("one plain tensor, got 36 in a DTensor.*leave the sparse layers out of fully_shard"):
            recipe(sharded, optimizers[1])
    before = bits([entry.full_tensor().detach() for entry in sharded.parameters()])
    others = model_of(torch.float64, density=0.9).state_dict()
    with refused_everywhere(
        "expected 36 connections, for which the values are sharded, got 108; load the checkpoint before fully_shard"
    ):
        set_model_state_dict(sharded, others, options=StateDictOptions(full_state_dict=True))
    assert bits([entry.full_tensor().detach() for entry in sharded.parameters()]) == before
    beside = nn.Sequential(model_of(), nn.Linear(6, 6))
    fully_shard(beside[1])
    offpath.SET(beside[0], torch.optim.SGD(beside.parameters(), lr=0.1))
    with refused_everywhere("is in no parameter group|DTensor|plain tensor"):
        model = model_of()
        optimizer, topology = _set(model, update_freq=1)
        fully_shard(model)
        topology.step()


check(_fully_shard)


def _tensor_parallel() -> None:
    """torch's own error asks for connections that are DTensors as well."""
    x = distribute_tensor(torch.ones(4, 12), init_device_mesh("cpu", (count(),)), [Shard(1)])
    for layer in (offpath.SparseLinear(12, 6), TopK(3)):
        for context in (nullcontext(), torch.no_grad()):
            with context, refused_everywhere(r"expected plain tensors, got a DTensor .* by x\.full_tensor\(\)"):
                layer(x)
        layer(x.full_tensor())


check(_tensor_parallel)
