"""The methods that look at inputs: group after group of a walk through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from offpath.convert.prune import scores, sparsegpt, wanda
from offpath.convert.prune.calibration import Statistic, Walk
from offpath.convert.prune.inputs import Hessian, Norms
from offpath.convert.prune.layer import Layer
from offpath.convert.prune.survey import Survey

Groups = Sequence[list[Layer]]


def prune_by_wanda(
    walk: Walk, survey: Survey, groups: Groups, densities: Mapping[Layer, float], scope: str
) -> list[Layer]:
    """Zero weights by Wanda's score, to the density of each layer. Returns layers that are fed nothing any more."""
    ranked: dict[Layer, scores.Score] = {}

    def prune(layers: list[Layer], norms: Norms) -> None:
        value = norms.value()
        for layer in layers:
            ranked[layer] = partial(_wanda, layer, value)
            if scope != "global":
                keep = scores.keep_in_rows if scope == "output" else scores.keep_in_layer
                layer.zero(keep(ranked.pop(layer), densities[layer]))

    lost = _each(walk, survey, groups, Norms, prune)
    if ranked:
        scores.zero_over_all(ranked, next(iter(densities.values())))
    return lost


def prune_by_sparsegpt(
    walk: Walk, survey: Survey, groups: Groups, densities: Mapping[Layer, float], blocksize: int, dampening: float
) -> list[Layer]:
    """Replace weights by SparseGPT's, to the density of each layer. Returns layers that are fed nothing any more."""

    def prune(layers: list[Layer], hessian: Hessian) -> None:
        try:
            inverse = sparsegpt.invert(hessian.value(), dampening)
        except sparsegpt.SingularHessianError:
            names = ", ".join(repr(layer.name) for layer in layers)
            raise ValueError(
                f"expected a Hessian that can be inverted, got a singular one at the input of {names} from "
                f"{hessian.count} tokens with dampening {dampening}; raise dampening or calibrate with more"
            ) from None
        for layer in layers:
            weight = layer.matrices()
            nnz = round(densities[layer] * weight.numel())
            adapted = sparsegpt.solve(weight, inverse, nnz, blocksize).to(weight.dtype)
            if not bool(torch.isfinite(torch.stack(torch.aminmax(adapted))).all()):
                raise ValueError(
                    f"expected adapted weights of layer {layer.name!r} that {weight.dtype} can hold, got infinity; "
                    f"raise dampening ({dampening}) or prune in float32"
                )
            layer.write(adapted)

    return _each(walk, survey, groups, Hessian, prune)


def _each(
    walk: Walk,
    survey: Survey,
    groups: Groups,
    kind: type[Statistic],
    prune: Callable[[list[Layer], Statistic], None],
) -> list[Layer]:
    """Hand each set of layers that read the same inputs to `prune`, with what was counted of them."""
    lost: list[Layer] = []
    done = 0
    for group in groups:
        try:
            for layers, statistic in walk.statistics(survey, group, kind):
                if statistic is None:
                    lost += layers
                else:
                    prune(layers, statistic)
                    done += len(layers)
        except ValueError as error:
            if not done:
                raise
            total = sum(len(group) for group in groups)
            raise ValueError(
                f"{error} ({done} of {total} layers are pruned by now, the others as they were)"
            ) from error
    return lost


def _wanda(layer: Layer, norms: torch.Tensor) -> torch.Tensor:
    return wanda.scores(layer.matrices(), norms)
