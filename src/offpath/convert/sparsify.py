"""Dense model -> sparse model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from offpath import pattern as patterns
from offpath.convert.report import ConversionReport, LayerReport
from offpath.convert.swap import obstacles, swap_modules
from offpath.cost import model_bytes
from offpath.nn import SparseLinear
from offpath.topology import layer_densities

FilterFn = Callable[[nn.Module, str], bool]


def sparsify(
    model: nn.Module,
    sparsity: float = 0.9,
    distribution: str = "uniform",
    filter_fn: FilterFn | None = None,
    method: str = "random",
    seed: int | None = None,
) -> ConversionReport:
    """Swap the `nn.Linear` layers of `model` for `SparseLinear`, in place, and report what was done.

    `distribution` shares the connections over the layers: `"uniform"` or `"erk"`. `filter_fn(module, fqn)` chooses
    the layers; the default takes all. `method="random"` starts sparse training: random connections, freshly
    initialised for their live fan-in (the dense weights are discarded, biases stay). `method="magnitude"` keeps the
    largest weights with their values. `seed` makes the random draw repeatable without touching torch's global RNG.

    Build the optimizer afterwards: one built before holds the dense parameters. Layers that cannot be swapped
    without changing what the model computes (tied or computed weights, hooks) stay dense and stand in the report.
    Raises `ValueError`, before anything is changed, for a bad argument, a NaN weight or a model that is itself an
    `nn.Linear`.

    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> print(sparsify(model, sparsity=0.9, seed=0))
    layer  shape (out x in)    nnz  sparsity  bytes before  bytes after
    0             100 x 784  7,840    90.00%       314,000       63,532
    2              10 x 100    100    90.00%         4,040          892
    total                    7,940    90.00%       318,040       64,424
    """
    if isinstance(model, nn.Linear):
        raise ValueError("expected a model that contains nn.Linear layers, got one; use SparseLinear.from_dense")
    if method not in ("random", "magnitude"):
        raise ValueError(f"expected method to be 'random' or 'magnitude', got {method!r}")
    chosen, skipped = _choose(model, filter_fn)
    shapes = [(linear.out_features, linear.in_features) for linear in chosen.values()]
    densities = layer_densities(shapes, sparsity, distribution)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    replacements: dict[nn.Module, nn.Module] = {}
    layers = []
    for (name, linear), density in zip(chosen.items(), densities, strict=True):
        nnz = min(round(density * linear.weight.numel()), linear.weight.numel())
        if method == "random":
            layer = _random(linear, nnz, generator)
        else:
            layer = SparseLinear.from_dense(linear, _largest(name, linear, nnz))
        replacements[linear] = layer
        layers.append(
            LayerReport(
                name,
                (linear.out_features, linear.in_features),
                nnz,
                model_bytes(linear),
                model_bytes(layer),
            )
        )
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))


def _choose(model: nn.Module, filter_fn: FilterFn | None) -> tuple[dict[str, nn.Linear], list[tuple[str, str]]]:
    blocked = obstacles(model, nn.Linear, "weight")
    chosen: dict[str, nn.Linear] = {}
    skipped = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if module in blocked:
            skipped.append((name, blocked[module]))
        else:
            chosen[name] = module
    return chosen, skipped


def _random(linear: nn.Linear, nnz: int, generator: torch.Generator | None) -> SparseLinear:
    weight, bias = linear.weight, linear.bias
    pattern = patterns.random((linear.out_features, linear.in_features), nnz, generator, weight.device)
    layer = SparseLinear(
        linear.in_features,
        linear.out_features,
        bias is not None,
        weight.device,
        weight.dtype,
        pattern=pattern,
        generator=generator,
    )
    layer.values.requires_grad_(weight.requires_grad)
    if bias is not None and layer.bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer.train(linear.training)


def _largest(name: str, linear: nn.Linear, nnz: int) -> patterns.Pattern:
    magnitudes = linear.weight.detach().abs().flatten()
    if bool(magnitudes.isnan().any()):
        raise ValueError(f"expected finite weights to rank by magnitude, got NaN in layer {name!r}")
    positions = magnitudes.topk(nnz, sorted=False).indices.sort().values
    return patterns.from_positions(positions, (linear.out_features, linear.in_features))
