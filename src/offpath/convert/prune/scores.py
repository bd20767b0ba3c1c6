"""Which weights of a layer, or of all layers at once, are kept by their score."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offpath.convert.prune.layer import Layer
from offpath.convert.prune.select import BLOCK, keep_largest, keep_largest_of_all

# The scores of a layer's weights, [groups, rows, columns], none below zero.
Score = Callable[[], Tensor]
Progress = Callable[[int, int], object]


def magnitude(layer: Layer) -> Tensor:
    """|W_ij|, exactly: in float32, or float64 where the weight is."""
    weight = layer.matrices()
    return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))


def random(layer: Layer, seed: int) -> Tensor:
    """Uniform numbers that depend on `seed` alone, also on another device. In float64, where hardly two are equal."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.matrices().shape
    return torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator).to(layer.weight.device)


def keep_in_layer(scores: Score, density: float) -> Tensor:
    """The round(density * size) largest of all scores of a layer, [groups, rows, columns]."""
    return next(keep_largest_of_all([scores], round(density * scores().numel())))


def keep_in_rows(scores: Score, density: float) -> Tensor:
    """The round(density * columns) largest of each row of the scores [groups, rows, columns]."""
    all_scores = scores()
    columns = all_scores.shape[2]
    blocks = all_scores.reshape(-1, columns).split(max(1, BLOCK // columns))
    keep = torch.cat([keep_largest(block, round(density * columns)) for block in blocks])
    return keep.view_as(all_scores)


def zero_over_all(scores: Mapping[Layer, Score], density: float, progress: Progress | None = None) -> None:
    """Zero all but the round(density * size) weights with the largest scores of all layers together.

    The scores of one layer at a time are in memory; each is asked for several times.
    """
    count = round(density * sum(layer.weight.numel() for layer in scores))
    doubles = any(layer.weight.dtype == torch.float64 for layer in scores)

    def alike(score: Score) -> Score:
        return lambda: score().double() if doubles else score()

    kept = keep_largest_of_all([alike(score) for score in scores.values()], count)
    for done, (layer, keep) in enumerate(zip(scores, kept, strict=True), 1):
        layer.zero(keep)
        if progress is not None:
            progress(done, len(scores))
