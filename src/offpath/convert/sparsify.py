"""Dense model -> sparse model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offpath import pattern as patterns
from offpath.convert.report import ConversionReport, LayerReport
from offpath.convert.swap import obstacles, swap_modules, unfit
from offpath.cost import model_bytes
from offpath.nn import SparseConv1d, SparseConv2d, SparseLinear
from offpath.nn.compiled import inside_compiled
from offpath.nn.filters import FilterFn, check_filter
from offpath.topology import layer_densities

# The dense layers that can be made sparse, and what they become.
SPARSE_CLASSES: dict[Any, Any] = {nn.Linear: SparseLinear, nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained
def sparsify(
    model: nn.Module,
    sparsity: float = 0.9,
    distribution: str = "uniform",
    filter_fn: FilterFn | None = None,
    method: str = "random",
    seed: int | None = None,
    modules: Sequence[type[nn.Module]] = (nn.Linear,),
) -> ConversionReport:
    """Swap the `nn.Linear` layers of `model` for `SparseLinear`, in place, and report what was done.

    `distribution` shares the connections over the layers: `"uniform"` or `"erk"`. `modules` names the classes that are
    swapped: `nn.Conv2d` and `nn.Conv1d` become `SparseConv2d` and `SparseConv1d`. `filter_fn(module, fqn)` chooses
    among their layers; the default takes all. `method="random"` starts sparse training: random connections, freshly
    initialised for their live fan-in (the dense weights are discarded, biases stay). `method="magnitude"` keeps the
    largest weights with their values. `seed` makes the random draw repeatable without touching torch's global RNG.

    Build the optimizer afterwards: one built before holds the dense parameters. Layers that cannot be swapped
    without changing what the model computes (tied or computed weights, hooks, a `weight` that the code around reads)
    stay dense and stand in the report. Around sparse layers, torch's encoders call their layers in inference, too.
    Raises `ValueError`, before anything is changed, for a bad argument, a model that is itself such a layer, and a
    weight without a magnitude: NaN, or on the meta device.

    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> print(sparsify(model, sparsity=0.9, seed=0))
    layer  shape (out x in)    nnz  sparsity  bytes before  bytes after
    0             100 x 784  7,840    90.00%       314,000       63,532
    2              10 x 100    100    90.00%         4,040          892
    total                    7,940    90.00%       318,040       64,424
    """
    model = inside_compiled(model)
    if isinstance(model, tuple(SPARSE_CLASSES)):
        raise ValueError(
            f"expected a model that contains layers, got a {type(model).__name__} itself; use SparseLinear.from_dense, "
            "or that of SparseConv1d and SparseConv2d"
        )
    if isinstance(modules, type):
        raise ValueError(f"expected a sequence of classes in modules, got one; write modules=(nn.{modules.__name__},)")
    unknown = [kind for kind in modules if kind not in SPARSE_CLASSES]
    if unknown:
        known = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_CLASSES)
        raise ValueError(f"expected modules among {known}, got {unknown[0]!r}")
    if method not in ("random", "magnitude"):
        raise ValueError(f"expected method to be 'random' or 'magnitude', got {method!r}")
    chosen, skipped = _choose(model, tuple(modules), filter_fn)
    shapes = [tuple(dense.weight.shape) for dense in chosen.values()]
    densities = layer_densities(shapes, sparsity, distribution)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    replacements: dict[nn.Module, nn.Module] = {}
    layers = []
    for (name, dense), density in zip(chosen.items(), densities, strict=True):
        nnz = min(round(density * dense.weight.numel()), dense.weight.numel())
        if method == "random":
            layer = _random(dense, nnz, generator)
        else:
            layer = SPARSE_CLASSES[type(dense)].from_dense(dense, _largest(name, dense, nnz))
        replacements[dense] = layer
        layers.append(LayerReport(name, _matrix(dense), nnz, model_bytes(dense), model_bytes(layer)))
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))


def _choose(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], filter_fn: FilterFn | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    check_filter(filter_fn)
    blocked: dict[nn.Module, str] = {}
    for kind in kinds:
        blocked |= obstacles(model, kind, "weight")
    chosen: dict[str, Any] = {}
    skipped = []
    for name, module in model.named_modules():
        if not isinstance(module, kinds):
            if filter_fn is None and type(module) in SPARSE_CLASSES:
                kind_name = type(module).__name__
                skipped.append((name, f"it is a {kind_name}; name nn.{kind_name} in modules= to make it sparse"))
        elif filter_fn is not None and not filter_fn(module, name):
            continue
        elif module in blocked:
            skipped.append((name, blocked[module]))
        elif reason := _unfit(module):
            skipped.append((name, reason))
        else:
            chosen[name] = module
    return chosen, skipped


def _unfit(dense: Any) -> str | None:
    if getattr(dense, "padding_mode", "zeros") != "zeros":
        return f"it pads with {dense.padding_mode!r}; sparse convolutions pad with zeros"
    return unfit(dense.weight.detach())


def _matrix(dense: Any) -> tuple[int, int]:
    """The shape of its pattern: outputs, and inputs or what a kernel holds."""
    rows, columns = dense.weight.flatten(1).shape
    return rows, columns


@torch.no_grad()
def _random(dense: Any, nnz: int, generator: torch.Generator | None) -> nn.Module:
    pattern = patterns.random(_matrix(dense), nnz, generator, dense.weight.device)
    layer = SPARSE_CLASSES[type(dense)].from_dense(dense, pattern)
    layer.reset_parameters(generator)
    if dense.bias is not None:
        layer.bias.copy_(dense.bias)
    return layer


def _largest(name: str, dense: Any, nnz: int) -> patterns.Pattern:
    magnitudes = dense.weight.detach().abs().flatten()
    if magnitudes.is_meta:
        raise ValueError(
            f"expected weights to rank by magnitude, got layer {name!r} on the meta device; load its weights first"
        )
    if bool(magnitudes.isnan().any()):
        raise ValueError(f"expected finite weights to rank by magnitude, got NaN in layer {name!r}")
    positions = magnitudes.topk(nnz, sorted=False).indices.sort().values
    return patterns.from_positions(positions, _matrix(dense))
