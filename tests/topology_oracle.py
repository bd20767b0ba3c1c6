"""What each recipe does, as a simulation over dense weights and masks; and the checks that hold the package to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import offpath
from offpath import SparseLinear, pattern as patterns, topology as parts

STEPS, FREQ, END, SEED = 50, 5, 40, 3
Growth = Callable[[Tensor, int], Tensor]  # (free positions, count) -> chosen ones


@dataclass
class Dense:
    """One dense layer of the simulation, with the gradient that nobody masked."""

    linear: nn.Linear
    mask: Tensor
    initial_nnz: int
    whole_gradient: Tensor
    gradients_since_update: list[Tensor] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach()


def _rewired(layer: Dense, importance: Tensor, dropped: int, growth: Growth, grown: int) -> Tensor:
    connections, free = (m.flatten().nonzero().squeeze(1) for m in (layer.mask, ~layer.mask))
    mask = layer.mask.flatten().clone()
    mask[connections[torch.sort(importance.flatten()[connections], stable=True).indices[:dropped]]] = False
    mask[growth(free, grown)] = True
    return mask.view_as(layer.mask)


def _random(layer: Dense, generator: torch.Generator) -> Growth:
    return lambda free, count: free[patterns.distinct(len(free), count, generator)]


def _gradient(layer: Dense, generator: torch.Generator) -> Growth:
    scores = layer.whole_gradient.abs().flatten()
    return lambda free, count: free[torch.sort(scores[free], descending=True, stable=True).indices[:count]]


def _momentum(steps: int) -> Callable[[Dense, torch.Generator], Growth]:
    def growth(layer: Dense, generator: torch.Generator) -> Growth:
        recent = reversed(layer.gradients_since_update[-steps:])
        layer.whole_gradient = sum(0.5**age * gradient for age, gradient in enumerate(recent))
        return _gradient(layer, generator)

    return growth


def growing_by_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, update_freq: int = FREQ, **settings
) -> parts.Topology:
    schedule, budget = parts.Every(update_freq, END), parts.PerLayer(parts.Constant(0.3))
    recipe = parts.Recipe("momentum", schedule, parts.drop.magnitude, parts.grow.Momentum(0.5, steps), budget)
    return parts.Topology(model, optimizer, recipe, **settings)


def _magnitude(layer: Dense) -> Tensor:
    return layer.weight.abs()


def _mest(layer: Dense) -> Tensor:
    return layer.weight.abs() + layer.whole_gradient.abs()


def _cosine(step: int) -> float:
    return 0.3 * 0.5 * (1 + math.cos(math.pi * step / END))


def _moving(importance, growth, fraction):
    def update(step: int, layers: list[Dense], generator: torch.Generator) -> list[Tensor] | None:
        if step % FREQ or step >= END:
            return None
        counts = [round(fraction(step) * int(layer.mask.sum())) for layer in layers]
        return [
            _rewired(layer, importance(layer), k, growth(layer, generator), k)
            for layer, k in zip(layers, counts, strict=True)
        ]

    return update


def _moving_over_all_layers(step: int, layers: list[Dense], generator: torch.Generator) -> list[Tensor] | None:
    if step % FREQ or step >= END:
        return None
    total = round(0.3 * sum(int(layer.mask.sum()) for layer in layers))
    drops = _counts_of_lowest(layers, total)
    left = [int(layer.mask.sum()) - k for layer, k in zip(layers, drops, strict=True)]
    grows = [total * n // sum(left) for n in left]
    remainders = [total * n % sum(left) for n in left]
    while sum(grows) < total:
        most = remainders.index(max(remainders))
        grows[most], remainders[most] = grows[most] + 1, -1
    return [
        _rewired(layer, _magnitude(layer), drop, _random(layer, generator), grow)
        for layer, drop, grow in zip(layers, drops, grows, strict=True)
    ]


def _counts_of_lowest(layers: list[Dense], total: int) -> list[int]:
    owner = torch.cat([torch.full((int(layer.mask.sum()),), i) for i, layer in enumerate(layers)])
    order = torch.sort(torch.cat([_magnitude(layer)[layer.mask] for layer in layers]), stable=True).indices
    return [int((owner[order[:total]] == i).sum()) for i in range(len(layers))]


def _cubic_sparsity(step: int, begin: float) -> float:
    return 0.8 + (begin - 0.8) * (1 - step / END) ** 3


def _gmp(step: int, layers: list[Dense], generator: torch.Generator) -> list[Tensor] | None:
    if step % FREQ or step > END:
        return None
    masks = []
    for layer in layers:
        size = layer.mask.numel()
        target = round((1 - _cubic_sparsity(step, 1 - layer.initial_nnz / size)) * size)
        drop = int(layer.mask.sum()) - target
        masks.append(_rewired(layer, _magnitude(layer), drop, _random(layer, generator), 0))
    return masks


def _gmp_over_all_layers(step: int, layers: list[Dense], generator: torch.Generator) -> list[Tensor] | None:
    if step % FREQ or step > END:
        return None
    size, begin = sum(layer.mask.numel() for layer in layers), sum(layer.initial_nnz for layer in layers)
    target = round((1 - _cubic_sparsity(step, 1 - begin / size)) * size)
    drops = _counts_of_lowest(layers, sum(int(layer.mask.sum()) for layer in layers) - target)
    return [
        _rewired(layer, _magnitude(layer), k, _random(layer, generator), 0)
        for layer, k in zip(layers, drops, strict=True)
    ]


MOVING = {"drop_fraction": 0.3, "update_freq": FREQ, "end_step": END, "seed": SEED}
PRUNING = {"final_sparsity": 0.8, "update_freq": FREQ, "end_step": END}
# Name: (the recipe, its settings, density at the start, the simulation of one update).
RECIPES = {
    "Static": (offpath.Static, {}, 0.4, lambda *_: None),
    "SET": (offpath.SET, MOVING, 0.4, _moving(_magnitude, _random, lambda step: 0.3)),
    "SET cosine": (offpath.SET, MOVING | {"schedule": "cosine"}, 0.4, _moving(_magnitude, _random, _cosine)),
    "SET global": (offpath.SET, MOVING | {"distribution": "global"}, 0.4, _moving_over_all_layers),
    "RigL": (offpath.RigL, MOVING, 0.4, _moving(_magnitude, _gradient, _cosine)),
    "momentum": (growing_by_momentum, {"steps": 3}, 0.4, _moving(_magnitude, _momentum(3), lambda step: 0.3)),
    # More steps than lie between two updates: those since the last one.
    "momentum since": (growing_by_momentum, {"steps": 9}, 0.4, _moving(_magnitude, _momentum(9), lambda step: 0.3)),
    "MEST": (offpath.MEST, MOVING, 0.4, _moving(_mest, _random, lambda step: 0.3)),
    "GMP from dense": (offpath.GMP, PRUNING, 1.0, _gmp),
    "GMP from sparse": (offpath.GMP, PRUNING, 0.6, _gmp),
    "GMP global": (offpath.GMP, PRUNING | {"distribution": "global"}, 0.6, _gmp_over_all_layers),
}


def _compare(
    recipe: str, model: nn.ModuleList, loss: Callable[[nn.ModuleList, int], Tensor], make_optimizer, same
) -> list[int]:
    """Train `model` and its dense simulation for 50 steps; returns the steps at which connections changed."""
    make, settings, _, update = RECIPES[recipe]
    layers = [Dense(m.to_dense(), m.pattern.to_mask(), m.nnz, torch.empty(0)) for m in model]
    dense = nn.ModuleList(layer.linear for layer in layers)
    optimizers = [make_optimizer(m.parameters()) for m in (model, dense)]
    topology, generator = make(model, optimizers[0], **settings), torch.Generator().manual_seed(SEED)
    changed = []
    for step in range(1, STEPS + 1):
        for module, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            loss(module, step).backward()
            for layer in layers if module is dense else ():
                layer.whole_gradient = layer.linear.weight.grad.clone()
                layer.gradients_since_update.append(layer.whole_gradient)
                layer.linear.weight.grad *= layer.mask
            optimizer.step()
        record, masks = topology.step(), update(step, layers, generator)
        assert (record is None) == (masks is None)
        for layer, mask in zip(layers, masks or (), strict=True) if masks else ():
            stays = mask & layer.mask
            for state in optimizers[1].state[layer.linear.weight].values():
                if isinstance(state, Tensor) and state.shape == mask.shape:
                    state.mul_(stays)
            layer.linear.weight.data *= stays  # what goes is lost, and what comes begins with zero
            layer.mask = mask
            layer.gradients_since_update.clear()
        if record is not None and record.dropped:
            changed.append(step)
        for sparse, layer in zip(model, layers, strict=True):
            assert torch.equal(sparse.pattern.to_mask(), layer.mask), f"step {step}"
            same(sparse.to_dense().weight, layer.linear.weight * layer.mask)
            same(sparse.bias, layer.linear.bias)
    return changed


def _model(recipe: str, *features: tuple[int, int]) -> nn.ModuleList:
    generator = torch.Generator().manual_seed(1)
    density = RECIPES[recipe][2]
    return nn.ModuleList(SparseLinear(*f, density=density, generator=generator, dtype=torch.float64) for f in features)


def integers(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def model_of_integers(recipe: str) -> nn.ModuleList:
    """Two layers beside each other, in float64, whose weights are small integers."""
    model = _model(recipe, (12, 10), (9, 14))
    for seed, layer in enumerate(model):
        layer.values.data.copy_(integers((1, layer.nnz), seed)[0])
        layer.bias.data.zero_()
    return model


def check_exact(recipe: str) -> None:
    """Small integers everywhere (a momentum of 1, a learning rate of 1): no sum is rounded, and ties are many."""
    model = model_of_integers(recipe)

    def loss(layers: nn.ModuleList, step: int) -> Tensor:
        outputs = [m(integers((8, m.in_features), step)) for m in layers]
        return sum((y * integers(tuple(y.shape), 1000 + step)).sum() for y in outputs)

    def same(a: Tensor, b: Tensor) -> None:
        assert torch.equal(a, b)

    changed = _compare(recipe, model, loss, lambda p: torch.optim.SGD(p, lr=1.0, momentum=1.0), same)
    assert len(changed) >= (0 if recipe == "Static" else 7)


def check_network(recipe: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """Two layers that depend on each other, in float64: the same connections in every step, and the same numbers."""
    model = _model(recipe, (12, 16), (16, 6))

    def loss(layers: nn.ModuleList, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x, target = (torch.randn(4, 2, n, generator=generator, dtype=torch.float64) for n in (12, 6))
        return (layers[1](layers[0](x).tanh()) - target).square().mean()

    changed = _compare(recipe, model, loss, lambda p: optimizer(p, lr=0.01), torch.testing.assert_close)
    assert len(changed) >= (0 if recipe == "Static" else 7)
