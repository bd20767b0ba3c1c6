"""Checks of what an update does to everything that hangs on a connection; `test_the_topology_checks.py` tests them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import offpath
from offpath import SparseLinear
from offpath.topology import Topology
from topology_oracle import growing_by_momentum

Optimizers = dict[str, Callable[..., torch.optim.Optimizer]]


class Accumulating(torch.optim.Optimizer):
    """One of the user's own: its state is a float64 sum, a count that is a plain number, and an int64 tensor."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("sum", torch.zeros_like(p, dtype=torch.float64)).add_(p.grad)
                state.setdefault("signs", torch.zeros_like(p, dtype=torch.int64)).add_(p.grad.sign().long())
                state["count"] = state.get("count", 0) + 1
                p.add_(state["sum"].to(p.dtype), alpha=-group["lr"] / state["count"])


class Ascending(torch.optim.Optimizer):
    """In the shape of sharpness-aware minimisation: the optimizer inside it steps, and keeps the state."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.base = base

    def step(self, closure=None) -> None:
        self.base.step()


OPTIMIZERS: Optimizers = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Lion": Lion,
    "the user's own": Accumulating,
    "Adam inside another": lambda p: Ascending(torch.optim.Adam(p)),
}


def model_of(dtype: torch.dtype = torch.float32, density: float = 0.3, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers = [SparseLinear(*f, density=density, dtype=dtype, generator=generator) for f in ((12, 10), (10, 6))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def rigl(model: nn.Module, update_freq: int = 3, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, offpath.RigL(model, optimizer, update_freq=update_freq, end_step=100, **settings)


def momentum_of(model: nn.Module, steps: int = 3) -> tuple[torch.optim.Optimizer, Topology]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, growing_by_momentum(model, optimizer, steps, update_freq=5)


def batch_of(seed: int) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    model(batch_of(step).to(dtype)).square().mean().backward()
    optimizer.step()


def per_connection(layer: SparseLinear, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that is kept for each connection, by name."""
    state = {k: v for k, v in _state(layer, optimizer).items() if isinstance(v, Tensor)}
    kept = {k: v for k, v in state.items() if v.shape == layer.values.shape}
    return {"value": layer.values.detach(), "gradient": layer.values.grad} | kept


def spread(layer: SparseLinear, tensor: Tensor) -> Tensor:
    return layer.pattern.to_dense(tensor.clone())


def check_update(
    make: Callable[[nn.Module, torch.optim.Optimizer], Topology],
    make_optimizer: Callable[..., torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Survivors keep every bit of all that belongs to them, the grown have zero, and the rest is as it was."""
    model = model_of(dtype)
    optimizer = make_optimizer(model.parameters())
    topology = make(model, optimizer)
    groups, parameters = list(optimizer.param_groups), list(model.parameters())
    for step in range(1, 9):
        train_step(model, optimizer, step)
        layers = [m for m in model if isinstance(m, SparseLinear)]
        masks = [layer.pattern.to_mask() for layer in layers]
        before = [{k: spread(m, t) for k, t in per_connection(m, optimizer).items()} for m in layers]
        rest = [_rest(layer, optimizer) for layer in layers]

        update = topology.step()

        if update is None:
            continue
        for layer, mask, old, others, record in zip(layers, masks, before, rest, update.layers, strict=True):
            new_mask, new = layer.pattern.to_mask(), per_connection(layer, optimizer)
            assert record.dropped == int((mask & ~new_mask).sum()) > 0
            assert record.grown == int((new_mask & ~mask).sum())
            assert record.nnz == layer.nnz == int(mask.sum()) - record.dropped + record.grown
            assert new.keys() == old.keys()
            for name, tensor in new.items():
                assert torch.equal(spread(layer, tensor), old[name] * (mask & new_mask)), name
                assert tensor.dtype == old[name].dtype
            assert _rest(layer, optimizer) == others
    assert topology.step_count == 8 and update is not None
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def _state(layer: SparseLinear, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    return getattr(optimizer, "base", optimizer).state[layer.values]


def _rest(layer: SparseLinear, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    state = _state(layer, optimizer).items()
    numbers = {
        k: float(v) for k, v in state if not isinstance(v, Tensor) or v.shape != layer.values.shape if v is not None
    }
    return numbers | {"training": layer.training, "requires_grad": layer.values.requires_grad}


def check_average(decay: float | None, use_buffers: bool = False) -> None:
    """An averaged model has the connections of the model; its survivors keep their bits, the grown have zero."""
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay else None, use_buffers=use_buffers)
    topology = offpath.SET(model, optimizer, update_freq=2, also=[average])
    for step in range(1, 7):
        train_step(model, optimizer, step)
        average.update_parameters(model)
        twins = [(layer, average.module[i]) for i, layer in enumerate(model) if isinstance(layer, SparseLinear)]
        before = [(twin.pattern.to_mask(), twin.to_dense().weight) for _, twin in twins]
        topology.step()
        for (layer, twin), (mask, weight) in zip(twins, before, strict=True):
            assert twin.pattern.equals(layer.pattern)
            assert torch.equal(twin.to_dense().weight, weight * (mask & twin.pattern.to_mask()))
        average(torch.randn(5, 12))
    assert int(average.n_averaged) == 6


def check_scores(passes: int, calls: int, leading: tuple[int, ...]) -> None:
    """The gradient that RigL scores with is the dense one, summed over all passes and calls; small integers: exact."""
    seen: dict[str, Tensor] = {}

    class Spy(offpath.topology.grow.Gradient):
        def __call__(self, layer, count):
            rows = [layer.gradient_of_rows(first, first + 1) for first in range(layer.pattern.shape[0])]
            seen[layer.name] = torch.cat(rows)
            return super().__call__(layer, count)

    layer = SparseLinear(6, 5, density=0.4, generator=torch.Generator().manual_seed(0))
    dense = layer.to_dense()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    schedule, budget = offpath.topology.Every(2), offpath.topology.PerLayer(offpath.topology.Constant(0.3))
    recipe = offpath.topology.Recipe("spy", schedule, offpath.topology.drop.magnitude, Spy(), budget)
    topology = Topology(layer, optimizer, recipe)
    generator = torch.Generator().manual_seed(1)
    for step in (1, 2):
        dense.zero_grad()
        for _ in range(passes):
            draw = torch.randint(-2, 3, (calls, *leading, 11), generator=generator).float()
            for module in (layer, dense):
                outputs = [module(x[..., :6]) * x[..., 6:] for x in draw]
                sum(y.sum() for y in outputs).backward()
        assert (topology.step() is None) == (step == 1)
    assert torch.equal(seen[""], dense.weight.grad)
