"""Many processes train as one does, and stay alike however the model is wrapped."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel

import offpath
from offpath import SparseLinear
from offpath.topology import Topology
from offpath.topology.select import BLOCK_ENTRIES
from ranks import Wrapped, bits, check, count, my_rank, refused_everywhere, same_everywhere, train_step
from topology_checks import model_of
from topology_oracle import RECIPES, STEPS, integers, model_of_integers

# Changes of nnz need parameters that may change their size.
RESIZING = {"GMP global", "GMP from dense", "SET global"}
WRAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "no buffers": {"broadcast_buffers": False},
}

# --- N processes train as one does -----------------------------------------------------------------------------------


def _equals_one_process(recipe: str) -> None:
    """Small integers over a power of two everywhere: no sum is rounded, so the bound on the difference is zero."""
    make, settings, _, _ = RECIPES[recipe]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model_of_integers(recipe)

        def forward(self, step: int, ranks: list[int]) -> Tensor:
            loss = torch.zeros((), dtype=torch.float64)
            for layer in self.layers:
                for rank in ranks:  # the tokens of these processes, one after the other
                    seed = 10 * step + rank
                    y = layer(integers((8, layer.in_features), seed))
                    loss = loss + (y * integers(tuple(y.shape), 1000 + seed)).sum() / len(ranks)
            return loss

    alone, together = Both(), Both()
    wrapped = Wrapped(together, gradient_as_bucket_view=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0, momentum=1.0) for m in (alone, together)]
    own, _ = distributed.new_subgroups(1)
    topologies = [
        make(alone, optimizers[0], process_group=own, **settings),
        make(wrapped, optimizers[1], **settings),
    ]
    ranks = list(range(count()))
    for step in range(1, STEPS + 1):
        for model, optimizer, mine in zip((alone, wrapped), optimizers, (ranks, [my_rank()]), strict=True):
            optimizer.zero_grad()
            model(step, mine).backward()
            optimizer.step()
        updates = [topology.step() for topology in topologies]
        assert updates[0] == updates[1]
        states = alone.state_dict(), together.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), step
    assert recipe == "Static" or topologies[1].survey()[0].unmoved < alone.layers[0].nnz or "GMP" in recipe
    same_everywhere(together, optimizers[1])


for name in ("SET", "SET global", "RigL", "momentum", "MEST", "GMP from dense", "GMP global"):
    check(_equals_one_process, name)


def _gradient_within_its_bound() -> None:
    """|g - g64| <= gamma_k |dy|' |x|, k additions: those of all tokens, one per process, and the division."""
    layer, tokens = SparseLinear(64, 32, generator=torch.Generator().manual_seed(0)), 16 * count()
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, n, generator=generator) for n in (64, 32))
    wrapped = Wrapped(layer)
    mine = slice(16 * my_rank(), 16 * (my_rank() + 1))
    (wrapped(x[mine]) * dy[mine]).sum().backward()
    rows, columns = layer.pattern.row_indices().long(), layer.pattern.col_indices.long()
    exact = (dy.double().t() @ x.double() / count())[rows, columns]
    size = (dy.double().abs().t() @ x.double().abs() / count())[rows, columns]
    k, u = tokens + count() + 1, torch.finfo(torch.float32).eps / 2
    assert layer.values.grad is not None
    assert bool(((layer.values.grad.double() - exact).abs() <= k * u / (1 - k * u) * size).all())


check(_gradient_within_its_bound)


# --- Ranks stay alike, however the model is wrapped ------------------------------------------------------------------


def _ranks_stay_alike(recipe: str, wrap: str, accumulate: int = 1) -> None:
    make, settings, density, _ = RECIPES[recipe]
    settings = settings | {"update_freq": 3}
    model = model_of(density=density)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wrapped, sizes = Wrapped(model, **WRAPS[wrap]), []
    wrapped.register_comm_hook(sizes, _recording)
    average = AveragedModel(wrapped)
    # In it or around it: both are natural. Only a wrapper that is known can be told of other sizes.
    topology = make(wrapped if recipe in RESIZING else model, optimizer, also=[average], **settings)
    for step in range(1, 12):
        before = sum(p.numel() for p in model.parameters())
        sizes.clear()
        train_step(wrapped, optimizer, step, accumulate)
        assert sum(sizes) == before, "what goes over the wire has nnz entries, and is sent once a step"
        average.update_parameters(wrapped)
        update = topology.step()
        assert (update is None) == (step % 3 != 0) and (update is None or update.dropped > 0)
        average(torch.ones(1, 12))
    assert topology.layer_names == ("0", "2")
    same_everywhere(model, optimizer)
    same_everywhere(average, optimizer)


def _recording(sizes, bucket):  # torch compares annotations with classes, and here they are strings
    sizes.append(bucket.buffer().numel())
    work = distributed.all_reduce(bucket.buffer().div_(count()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


for name in ("SET", "RigL", "GMP from dense", "SET global"):
    for wrap in WRAPS:
        if not (name in RESIZING and wrap == "static graph"):
            check(_ranks_stay_alike, name, wrap)
check(_ranks_stay_alike, "RigL", "views", 3)
check(_ranks_stay_alike, "momentum", "views", 3)
check(_ranks_stay_alike, "GMP global", "plain", 2)


def _one_process_wrapped(recipe: str) -> None:
    """As `torchrun --nproc-per-node 1` and Lightning's strategy="ddp" with one device have it."""
    make, settings, density, _ = RECIPES[recipe]
    alone, inner = (model_of(density=density) for _ in range(2))
    wrapped = Wrapped(inner)
    for model in (alone, wrapped):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        topology = make(model, optimizer, **settings | {"update_freq": 2})
        for step in range(1, 6):
            train_step(model, optimizer, step)
            topology.step()
    assert bits(alone.state_dict()) == bits(inner.state_dict())


for name in ("SET", "RigL", *sorted(RESIZING)):
    check(_one_process_wrapped, name)


def _zero_redundancy_optimizer(recipe: str) -> None:
    """Each process keeps the state of some weights, inside of another optimizer: training is that of plain Adam."""
    make, settings, density, _ = RECIPES[recipe]
    models = [model_of(density=density) for _ in range(2)]
    for model in models:
        wrapped = Wrapped(model)
        if model is models[0]:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        else:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
        topology = make(wrapped, optimizer, **settings | {"update_freq": 2})
        for step in range(1, 6):
            train_step(wrapped, optimizer, step)
            topology.step()
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())


for name in ("RigL", "GMP from dense"):
    check(_zero_redundancy_optimizer, name)


def _zero_redundancy_optimizer_resumed() -> None:
    """From a consolidated state, of which each process keeps its own part."""

    def start(model: nn.Module) -> tuple[nn.Module, ZeroRedundancyOptimizer, offpath.topology.Topology]:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
        wrapped = Wrapped(model)
        return wrapped, optimizer, offpath.SET(wrapped, optimizer, update_freq=2)

    def train(run: tuple[nn.Module, ZeroRedundancyOptimizer, offpath.topology.Topology], steps: range) -> None:
        wrapped, optimizer, topology = run
        for step in steps:
            train_step(wrapped, optimizer, step)
            topology.step()

    models = [model_of(), model_of()]
    run = start(models[0])
    train(run, range(1, 4))
    _, optimizer, topology = run
    optimizer.consolidate_state_dict(to=0)
    held = [optimizer.state_dict() if my_rank() == 0 else None]
    distributed.broadcast_object_list(held, src=0)
    models[1].load_state_dict(models[0].state_dict())
    resumed = start(models[1])
    resumed[1].load_state_dict(copy.deepcopy(held[0]))  # torch keeps the tensors that it is given
    resumed[2].load_state_dict(topology.state_dict())
    for one in (run, resumed):
        train(one, range(4, 8))
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())


check(_zero_redundancy_optimizer_resumed)


def _a_layer_that_one_batch_does_not_use() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = model_of()

        def forward(self, x: Tensor) -> Tensor:
            return self.branches[0](x) if my_rank() else self.branches(x)

    model = Branches()
    optimizer = torch.optim.Adam(model.parameters())
    wrapped = Wrapped(model, find_unused_parameters=True)
    topology = offpath.RigL(wrapped, optimizer, update_freq=2, end_step=20)
    updates = []
    for step in range(1, 7):
        train_step(wrapped, optimizer, step)
        updates.append(topology.step())
    assert [update.grown > 0 for update in updates if update] == [True] * 3
    same_everywhere(model, optimizer)
    topology.step()
    with refused_everywhere("saw none"):
        topology.step()


check(_a_layer_that_one_batch_does_not_use)


def _resumes_to_the_same_bits(recipe: str) -> None:
    """The checkpoint may bring another number of connections into a model that is wrapped already."""
    make, settings, density, _ = RECIPES[recipe]

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Topology]:
        wrapped = Wrapped(model_of(density=density, seed=seed))
        optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.01)
        return wrapped, optimizer, make(wrapped, optimizer, **settings)

    def run(things: tuple[nn.Module, torch.optim.Optimizer, Topology], first: int, last: int) -> None:
        for step in range(first, last):
            train_step(*things[:2], step)
            things[2].step()

    whole, parts_of_it, resumed = start(0), start(0), start(9)
    run(whole, 1, 14)
    run(parts_of_it, 1, 7)
    for thing, saved in zip(resumed, parts_of_it, strict=True):
        thing.load_state_dict(saved.state_dict())
    run(resumed, 7, 14)
    assert bits([t.state_dict() for t in resumed]) == bits([t.state_dict() for t in whole])
    same_everywhere(*resumed[:2])


check(_resumes_to_the_same_bits, "RigL")
check(_resumes_to_the_same_bits, "momentum")
check(_resumes_to_the_same_bits, "GMP from dense")


def _no_dense_gradient_on_the_wire() -> None:
    layer = SparseLinear(1024, 1024, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wrapped = Wrapped(layer)
    topology, sizes, all_reduce = (
        offpath.RigL(wrapped, optimizer, update_freq=1, end_step=9),
        [],
        distributed.all_reduce,
    )
    wrapped(torch.randn(8, 1024)).sum().backward()
    optimizer.step()

    def recording(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    distributed.all_reduce = recording
    try:
        topology.step()
    finally:
        distributed.all_reduce = all_reduce
    assert max(sizes) <= BLOCK_ENTRIES and sum(sizes) == 1024 * 1024 + 1


check(_no_dense_gradient_on_the_wire)
