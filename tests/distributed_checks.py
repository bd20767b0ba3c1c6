"""What must hold in many processes. As a program it is one of them: it runs the checks that it is given in turn.

Every process runs every check; what one of them says went wrong is written down for `test_distributed.py`. The same
seed everywhere is the rule, and where a process is to differ, it says so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import offpath
from offpath import SparseLinear, topology as parts
from offpath.studies import RunConfig, RunError, train
from offpath.studies.data import load
from offpath.studies.ranks import Ranks
from offpath.studies.run import Run
from offpath.topology import LayerView, Topology, TopologyError
from offpath.topology.distributed import Processes
from offpath.topology.select import BLOCK_ENTRIES
from test_train_methods import SMALL, Stopper, numbers
from topology_checks import model_of
from topology_oracle import RECIPES, STEPS, integers, model_of_integers

CHECKS: dict[str, Callable[[], None]] = {}
Wrapped = DistributedDataParallel
# Changes of nnz need parameters that may change their size.
RESIZING = {"GMP global", "GMP from dense", "SET global"}
WRAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "no buffers": {"broadcast_buffers": False},
}


def _check(function: Callable[..., None], *arguments: object) -> None:
    name = " ".join([function.__name__.strip("_"), *map(str, arguments)])
    CHECKS[name] = lambda: function(*arguments)


def _rank() -> int:
    return distributed.get_rank()


def _count() -> int:
    return distributed.get_world_size()


def _gathered(value: Any) -> list[Any]:
    values = [None] * _count()
    distributed.all_gather_object(values, value)
    return values


def _same_everywhere(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Values, indices and the optimizer's state are equal bit for bit."""
    mine = json.dumps([_bits(model.state_dict()), _bits(optimizer.state_dict())])
    assert len(set(_gathered(mine))) == 1


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy().tobytes().hex()
    if isinstance(value, dict):
        return {str(key): _bits(entry) for key, entry in value.items()}
    return [_bits(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def _refused_everywhere(message: str) -> Iterator[None]:
    """Every process raises, with a message that matches."""
    said = "nothing"
    try:
        yield
    except (TopologyError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    everywhere = _gathered(said)
    assert all(re.search(message, text) for text in everywhere), everywhere


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, accumulate: int = 1) -> None:
    """A training step on tokens that no other process sees."""
    optimizer.zero_grad()
    for turn in range(accumulate):
        generator = torch.Generator().manual_seed(100 * step + 10 * turn + _rank())
        last = turn == accumulate - 1
        with nullcontext() if last or not isinstance(model, Wrapped) else model.no_sync():
            model(torch.randn(5, 12, generator=generator)).square().mean().backward()
    optimizer.step()


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
    ranks = list(range(_count()))
    for step in range(1, STEPS + 1):
        for model, optimizer, mine in zip((alone, wrapped), optimizers, (ranks, [_rank()]), strict=True):
            optimizer.zero_grad()
            model(step, mine).backward()
            optimizer.step()
        updates = [topology.step() for topology in topologies]
        assert updates[0] == updates[1]
        states = alone.state_dict(), together.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), step
    assert recipe == "Static" or topologies[1].survey()[0].unmoved < alone.layers[0].nnz or "GMP" in recipe
    _same_everywhere(together, optimizers[1])


for name in ("SET", "SET global", "RigL", "MEST", "GMP from dense", "GMP global"):
    _check(_equals_one_process, name)


def _gradient_within_its_bound() -> None:
    """|g - g64| <= gamma_k |dy|' |x|, k additions: those of all tokens, one per process, and the division."""
    layer, tokens = SparseLinear(64, 32, generator=torch.Generator().manual_seed(0)), 16 * _count()
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(tokens, n, generator=generator) for n in (64, 32))
    wrapped = Wrapped(layer)
    mine = slice(16 * _rank(), 16 * (_rank() + 1))
    (wrapped(x[mine]) * dy[mine]).sum().backward()
    rows, columns = layer.pattern.row_indices().long(), layer.pattern.col_indices.long()
    exact = (dy.double().t() @ x.double() / _count())[rows, columns]
    size = (dy.double().abs().t() @ x.double().abs() / _count())[rows, columns]
    k, u = tokens + _count() + 1, torch.finfo(torch.float32).eps / 2
    assert layer.values.grad is not None
    assert bool(((layer.values.grad.double() - exact).abs() <= k * u / (1 - k * u) * size).all())


_check(_gradient_within_its_bound)


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
        _step(wrapped, optimizer, step, accumulate)
        assert sum(sizes) == before, "what goes over the wire has nnz entries, and is sent once a step"
        average.update_parameters(wrapped)
        update = topology.step()
        assert (update is None) == (step % 3 != 0) and (update is None or update.dropped > 0)
        average(torch.ones(1, 12))
    assert topology.layer_names == ("0", "2")
    _same_everywhere(model, optimizer)
    _same_everywhere(average, optimizer)


def _recording(sizes, bucket):  # torch compares annotations with classes, and here they are strings
    sizes.append(bucket.buffer().numel())
    work = distributed.all_reduce(bucket.buffer().div_(_count()), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


for name in ("SET", "RigL", "GMP from dense", "SET global"):
    for wrap in WRAPS:
        if not (name in RESIZING and wrap == "static graph"):
            _check(_ranks_stay_alike, name, wrap)
_check(_ranks_stay_alike, "RigL", "views", 3)
_check(_ranks_stay_alike, "GMP global", "plain", 2)


def _a_layer_that_one_batch_does_not_use() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = model_of()

        def forward(self, x: Tensor) -> Tensor:
            return self.branches[0](x) if _rank() else self.branches(x)

    model = Branches()
    optimizer = torch.optim.Adam(model.parameters())
    wrapped = Wrapped(model, find_unused_parameters=True)
    topology = offpath.RigL(wrapped, optimizer, update_freq=2, end_step=20)
    updates = []
    for step in range(1, 7):
        _step(wrapped, optimizer, step)
        updates.append(topology.step())
    assert [update.grown > 0 for update in updates if update] == [True] * 3
    _same_everywhere(model, optimizer)
    topology.step()
    with _refused_everywhere("saw none"):
        topology.step()


_check(_a_layer_that_one_batch_does_not_use)


def _resumes_to_the_same_bits(recipe: str) -> None:
    """The checkpoint may bring another number of connections into a model that is wrapped already."""
    make, settings, density, _ = RECIPES[recipe]

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Topology]:
        wrapped = Wrapped(model_of(density=density, seed=seed))
        optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.01)
        return wrapped, optimizer, make(wrapped, optimizer, **settings)

    def run(things: tuple[nn.Module, torch.optim.Optimizer, Topology], first: int, last: int) -> None:
        for step in range(first, last):
            _step(*things[:2], step)
            things[2].step()

    whole, parts_of_it, resumed = start(0), start(0), start(9)
    run(whole, 1, 14)
    run(parts_of_it, 1, 7)
    for thing, saved in zip(resumed, parts_of_it, strict=True):
        thing.load_state_dict(saved.state_dict())
    run(resumed, 7, 14)
    assert _bits([t.state_dict() for t in resumed]) == _bits([t.state_dict() for t in whole])
    _same_everywhere(*resumed[:2])


_check(_resumes_to_the_same_bits, "RigL")
_check(_resumes_to_the_same_bits, "GMP from dense")


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


_check(_no_dense_gradient_on_the_wire)


# --- Ranks that differ are refused, everywhere and before anything has changed ---------------------------------------


def _set(model: nn.Module, recipe: Callable[..., Topology] = offpath.SET, **settings: Any) -> tuple[Any, Topology]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return optimizer, recipe(model, optimizer, **{"update_freq": 2} | settings)


def _other_connections() -> None:
    model = model_of(seed=_rank())
    for wrapped in (model, Wrapped(model)):  # the wrapper has broadcast rank 0's digest with its values
        with _refused_everywhere("the same connections in all .* but rank 1.* from one seed in every process"):
            _set(wrapped)


def _other_settings() -> None:
    with _refused_everywhere("the same random state .* the same seed"):
        _set(model_of(), seed=_rank())
    with _refused_everywhere("the same recipe and layers"):
        _set(model_of(), drop_fraction=0.1 + 0.1 * _rank())
    with _refused_everywhere("the same recipe and layers"):
        _set(nn.Sequential(*list(model_of())[: 1 + 2 * (_rank() == 0)]))


def _refused_update(message: str, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology) -> None:
    """The update that is due is refused in every process, and model, optimizer and topology are as they were."""
    before = _bits([model.state_dict(), optimizer.state_dict(), topology.state_dict()])
    with _refused_everywhere(message):
        topology.step()
    assert _bits([model.state_dict(), optimizer.state_dict(), topology.state_dict()]) == before


def _weights_that_nobody_averaged() -> None:
    model = model_of()
    optimizer, topology = _set(model)
    _step(model, optimizer, 1)
    topology.step()
    _refused_update("the same weights .* DistributedDataParallel, .* outside no_sync", model, optimizer, topology)


def _a_gradient_that_nobody_averaged() -> None:
    model = model_of()
    optimizer, topology = _set(model, offpath.MEST, update_freq=1)
    for layer in (model[0], model[2]):
        layer.values.grad = torch.randn(layer.nnz, generator=torch.Generator().manual_seed(_rank()))
    _refused_update("the same decision", model, optimizer, topology)


def _other_steps() -> None:
    model = model_of()
    optimizer, topology = _set(model)
    topology.load_state_dict(topology.state_dict() | {"step": 1 if _rank() else 3})
    _refused_update("the same steps", model, optimizer, topology)


def _a_rank_that_fails() -> None:
    def fails(layer: LayerView) -> Tensor:
        return layer.values.abs() if _rank() != 1 else torch.full_like(layer.values, torch.nan)

    model = model_of()
    recipe = parts.Recipe("fails", parts.Every(1), fails, parts.grow.random, parts.PerLayer(parts.Constant(0.3)))
    optimizer, topology = _set(model, lambda m, o, **_: Topology(m, o, recipe))
    message = "without NaN" if _rank() == 1 else "same success .* rank 1 .* its own error says why"
    _refused_update(f"{message}|without NaN|same success", model, optimizer, topology)


for function in (
    _other_connections, _other_settings, _weights_that_nobody_averaged, _a_gradient_that_nobody_averaged, _other_steps,
    _a_rank_that_fails,
):  # fmt: skip
    _check(function)


def _mutant(name: str) -> None:
    """A rank that decides for itself."""
    own = torch.Generator().manual_seed(_rank())
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
        _step(wrapped, optimizer, 1)
        _refused_update(
            "the same decision in all .* may only read what is the same everywhere", model, optimizer, topology
        )
    finally:
        setattr(kind, method, right)


for name in ("own gradient", "own draw"):
    _check(_mutant, name)


def _sizes_that_cannot_change() -> None:
    settings = {"end_step": 10, "final_sparsity": 0.9}
    model = model_of()
    with _refused_everywhere("pass the DistributedDataParallel itself"):
        _set(model, offpath.GMP, **settings)
    with _refused_everywhere("without static_graph=True"):
        _set(Wrapped(model, static_graph=True), offpath.GMP, **settings)
    with _refused_everywhere("without a process_group"):
        _set(Wrapped(model, process_group=distributed.new_group(range(_count()))), offpath.GMP, **settings)
    own, _ = distributed.new_subgroups(1)
    _, topology = _set(model, offpath.GMP, process_group=own, seed=_rank(), **settings)
    topology.step()
    assert topology.step().dropped > 0


_check(_sizes_that_cannot_change)


def _fully_shard() -> None:
    """With fixed connections it trains to the numbers of one process; a topology refuses it, unless it is left out."""
    alone, sharded = model_of(torch.float64), model_of(torch.float64)
    fully_shard(sharded)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, sharded)]
    tokens = [integers((8, 12), seed) for seed in range(_count())]
    for optimizer, model, mine in zip(optimizers, (alone, sharded), (torch.cat(tokens), tokens[_rank()]), strict=True):
        model(mine).square().mean().backward()
        optimizer.step()
    for a, b in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(b.full_tensor(), a.detach())
    for recipe in (offpath.SET, offpath.Static):
        with _refused_everywhere("one plain tensor, got 36 in a DTensor.*leave the sparse layers out of fully_shard"):
            recipe(sharded, optimizers[1])
    beside = nn.Sequential(model_of(), nn.Linear(6, 6))
    fully_shard(beside[1])
    offpath.SET(beside[0], torch.optim.SGD(beside.parameters(), lr=0.1))
    with _refused_everywhere("is in no parameter group|DTensor|plain tensor"):
        model = model_of()
        optimizer, topology = _set(model, update_freq=1)
        fully_shard(model)
        topology.step()


_check(_fully_shard)


# --- offpath train ---------------------------------------------------------------------------------------------------


def _config(method: str) -> RunConfig:
    # 65 samples do not divide by 2 or 4, and the last batch of an epoch of 1437 has 7. 23 steps an epoch.
    return replace(SMALL, method=method, batch_size=65, epochs=2 if method == "rigl" else 1, update_freq=5)


class _StopsOneRank(Stopper):
    """Ctrl-C that reaches the last process alone."""

    def on_step(self, run: Any) -> None:
        self.steps += 1
        if self.steps == self.after_steps and _rank() == _count() - 1:
            signal.raise_signal(signal.SIGINT)


def _run_stops_and_goes_on(method: str) -> None:
    ranks, config, folder = Ranks(_rank(), _count()), _config(method), Path(sys.argv[1])
    whole, halves = folder / f"{method}-whole-{_count()}", folder / f"{method}-parts-{_count()}"
    assert train(config, whole, Stopper(), ranks=ranks)
    assert not train(config, halves, _StopsOneRank(12), ranks=ranks)
    assert train(config, halves, Stopper(), resume=True, ranks=ranks)
    assert numbers(halves, ranks) == numbers(whole, ranks)


def _run_that_exists_is_refused() -> None:
    """By the first process, with a message; the others end quietly."""
    kind = None
    try:
        train(_config("rigl"), Path(sys.argv[1]) / f"rigl-whole-{_count()}", Stopper(), ranks=Ranks(_rank(), _count()))
    except (RunError, SystemExit) as error:
        kind = type(error).__name__
    assert _gathered(kind) == ["RunError"] + ["SystemExit"] * (_count() - 1)


def _run_shares_out_a_batch() -> None:
    """The last batch of an epoch, 7 samples, in float64: loss, hits and gradients are those of one process."""
    dataset = load("digits")
    dataset = replace(dataset, **{n: getattr(dataset, n).double() for n in ("train_images", "test_images")})
    torch.set_default_dtype(torch.float64)
    # All processes train the one that is alone, each for itself: the mean of equal gradients is the gradient.
    runs = [Run(_config("rigl"), dataset, ranks) for ranks in (Ranks(), Ranks(_rank(), _count()))]
    torch.set_default_dtype(torch.float32)
    for run in runs:
        run.step = run.steps_per_epoch - 1
        run.advance()
    alone, shared = runs
    assert shared.meter.samples == alone.meter.samples == 7 and shared.meter.correct == alone.meter.correct
    torch.testing.assert_close(shared.meter.loss_sum, alone.meter.loss_sum)
    for a, b in zip(alone.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(shared.evaluate(), alone.evaluate())


for name in ("rigl", "gmp"):
    _check(_run_stops_and_goes_on, name)
_check(_run_that_exists_is_refused)
_check(_run_shares_out_a_batch)


def main(rank: int, count: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{count}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    results = {}
    for name in names:
        try:
            CHECKS[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"results-{count}-{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]), json.loads(sys.argv[2]))
