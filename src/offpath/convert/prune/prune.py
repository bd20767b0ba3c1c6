"""The one call: zero most weights of a trained model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from offpath.convert.prune import scores
from offpath.convert.prune.calibrated import prune_by_sparsegpt, prune_by_wanda
from offpath.convert.prune.calibration import Walk, check_calibration
from offpath.convert.prune.layer import Layer
from offpath.convert.prune.quiet import undisturbed
from offpath.convert.prune.report import PrunedLayer, PruneReport
from offpath.convert.prune.scores import Progress
from offpath.convert.prune.targets import choose, unreached_reason
from offpath.nn.compiled import inside_compiled
from offpath.nn.filters import FilterFn
from offpath.topology import layer_densities

# Method: the scope it has unless told otherwise. SparseGPT compares within its blocks of columns only.
METHODS = {"magnitude": "layer", "random": "layer", "wanda": "output", "sparsegpt": None}
SCOPES = ("layer", "output", "global")
CALIBRATED = ("wanda", "sparsegpt")
BLOCKSIZE = 128
DAMPENING = 0.01


def prune(
    model: nn.Module,
    sparsity: float = 0.9,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    scope: str | None = None,
    distribution: str = "uniform",
    filter_fn: FilterFn | None = None,
    seed: int | None = None,
    *,
    blocksize: int = BLOCKSIZE,
    dampening: float = DAMPENING,
    progress: Progress | None = None,
) -> PruneReport:
    """Set a share `sparsity` of the weights of `model` to zero, in one shot and in place, and report per layer.

    Takes `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and Hugging Face's `Conv1D`, or those of them that
    `filter_fn(module, fqn)` chooses. Parameters stay the same dense objects and no mask is kept, so training on would
    bring the weights back. Nothing gets faster yet: swapping the layers for sparse ones is the next step. The papers
    leave a language model's head dense: `filter_fn=lambda module, fqn: "lm_head" not in fqn`.

    `method` says which weights go:

    - `"magnitude"`: the smallest |w|; `"random"`: any, drawn with `seed` or torch's global generator.
    - `"wanda"`: the smallest |w| times the norm of the input that it multiplies (Sun et al., 2023).
    - `"sparsegpt"`: those that cost least, and the others are adapted (Frantar & Alistarh, 2023), `blocksize` columns
      at a time, with `dampening` times its mean added to the Hessian's diagonal.

    `scope` says what they are compared with: `"layer"` (the default of magnitude and random) keeps
    round((1 - sparsity) * size) weights of each layer, `"output"` (wanda's default) round((1 - sparsity) * fan-in)
    of each output, `"global"` so many of all layers together; of equal weights, the first. SparseGPT takes a layer's
    share from each block of columns, and no scope. `distribution` shares the weights over the layers: `"uniform"` or
    `"erk"`; not with `"global"`. Weights that were zero before count as zeros, so a layer can end up sparser.

    `calibration` is a list, a `DataLoader` or the like of model inputs, for wanda and sparsegpt: a Tensor, a tuple of
    arguments, or a mapping of keyword arguments. Each position counts the same, padding included. It is gone through
    once to see which layers are called, and once more for each block of the model (an element of an `nn.ModuleList`
    or `nn.Sequential` of alike modules; a layer elsewhere) up to that block, so that each block is pruned with what
    the pruned blocks before it feed it: about 1 + blocks / 2 runs of the model over the data (wanda with scope
    `"global"`: 2). In memory are the statistics of one block: in features numbers (sparsegpt: their square) for each
    input, in float64. `progress(done, total)` is called after each batch of each pass, or after each layer.

    Layers that cannot be pruned (tied, masked or parametrized, quantised, sparse already), and those that the
    calibration data does not reach, stay as they are and stand in the report. Training modes, buffers, random numbers
    and gradients stay as they were. Raises `ValueError`, with nothing changed, for bad arguments, weights or
    activations that are NaN or infinite, and weights on the meta device. Whatever interrupts it later (activations
    that overflow only after pruning, Ctrl-C) leaves each layer either pruned or as it was.

    >>> model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> print(prune(model, sparsity=0.9, method="wanda", calibration=[torch.randn(64, 784)]))
    layer     weight    nnz  sparsity
    0      100 x 784  7,800    90.05%
    2       10 x 100    100    90.00%
    total             7,900    90.05%
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    model = inside_compiled(model)
    scope = _check_arguments(sparsity, method, calibration, scope, distribution, blocksize, dampening)
    layers, skipped = choose(model, filter_fn, by_inputs=calibration is not None)
    unreached: list[tuple[str, str]] = []
    with torch.inference_mode(False), torch.no_grad():
        if calibration is None:
            _prune_by_weight(layers, sparsity, method, scope, distribution, seed, progress)
        elif layers:
            _check_devices(layers)
            with undisturbed(model):
                walk = Walk(model, calibration, progress)
                survey, groups = walk.survey(layers, together=scope == "global")
                called = survey.called()
                shared = dict(zip(called, _densities(called, sparsity, distribution), strict=True))
                if method == "wanda":
                    lost = prune_by_wanda(walk, survey, groups, shared, str(scope))
                else:
                    lost = prune_by_sparsegpt(walk, survey, groups, shared, blocksize, dampening)
            unreached = [(a.name, unreached_reason(a)) for a in layers if a not in shared]
            unreached += [(a.name, "the calibration data does not reach it after pruning") for a in lost]
        missed = {name for name, _ in unreached}
        pruned = [PrunedLayer(a.name, tuple(a.weight.shape), a.nnz()) for a in layers if a.name not in missed]
    return PruneReport(tuple(pruned), tuple(skipped + unreached))


def _check_arguments(
    sparsity: float,
    method: str,
    calibration: Iterable[Any] | None,
    scope: str | None,
    distribution: str,
    blocksize: int,
    dampening: float,
) -> str | None:
    """The scope in force."""
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"expected scope to be one of {', '.join(SCOPES)}, got {scope!r}")
    if method == "sparsegpt" and scope is not None:
        raise ValueError(f"expected no scope with method 'sparsegpt', which compares within its blocks; got {scope!r}")
    layer_densities([], sparsity, distribution)
    if scope == "global" and distribution != "uniform":
        raise ValueError(
            f"expected distribution to be left alone with scope 'global', where all layers share, got {distribution!r}"
        )
    if method in CALIBRATED and calibration is None:
        raise ValueError(f"expected calibration, model inputs that method {method!r} looks at, got None")
    if method not in CALIBRATED and calibration is not None:
        raise ValueError(
            f"expected calibration with methods {' and '.join(CALIBRATED)} alone; {method!r} looks at no inputs"
        )
    if method != "sparsegpt" and (blocksize, dampening) != (BLOCKSIZE, DAMPENING):
        raise ValueError(f"expected blocksize and dampening with method 'sparsegpt' alone, got method {method!r}")
    if not (isinstance(blocksize, int) and blocksize > 0):
        raise ValueError(f"expected blocksize to be a positive number of columns, got {blocksize!r}")
    if not 0 < dampening < float("inf"):
        raise ValueError(f"expected dampening above 0, a share of the Hessian's mean diagonal, got {dampening}")
    if calibration is not None:
        check_calibration(calibration)
    return scope or METHODS[method]


def _check_devices(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.weight.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"expected layers on the CPU or a CUDA device, which have float64, got layer {layer.name!r} on "
                f"{layer.weight.device}; move the model, or prune by magnitude"
            )


def _densities(layers: Sequence[Layer], sparsity: float, distribution: str) -> list[float]:
    return layer_densities([tuple(layer.weight.shape) for layer in layers], sparsity, distribution)


def _prune_by_weight(
    layers: Sequence[Layer],
    sparsity: float,
    method: str,
    scope: str | None,
    distribution: str,
    seed: int | None,
    progress: Progress | None,
) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if method == "random":
        seeds = torch.randint(2**62, (len(layers),), device="cpu", generator=generator).tolist()
        ranked = {layer: partial(scores.random, layer, own) for layer, own in zip(layers, seeds, strict=True)}
    else:
        ranked = {layer: partial(scores.magnitude, layer) for layer in layers}
    if scope == "global":
        scores.zero_over_all(ranked, 1 - sparsity, progress)
        return
    keep = scores.keep_in_rows if scope == "output" else scores.keep_in_layer
    for done, (layer, density) in enumerate(zip(layers, _densities(layers, sparsity, distribution), strict=True), 1):
        layer.zero(keep(ranked[layer], density))
        if progress is not None:
            progress(done, len(layers))
