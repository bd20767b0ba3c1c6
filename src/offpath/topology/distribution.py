"""How layers share one overall sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from numbers import Real

Shape = tuple[int, ...]


def uniform(shapes: Sequence[Shape], density: float) -> list[float]:
    """Every layer has the overall density."""
    return [density] * len(shapes)


def erk(shapes: Sequence[Shape], density: float) -> list[float]:
    """Erdos-Renyi kernel: a layer's density is proportional to sum(shape) / prod(shape), and 1 at most.

    What a layer cannot take because it is full already goes to the others in the same proportion (Mocanu et al.,
    "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018; Evci et al.,
    "Rigging the Lottery", 2020).
    """
    sizes = [prod(shape) for shape in shapes]
    raw = [sum(shape) / size if size else 0.0 for shape, size in zip(shapes, sizes, strict=True)]
    full: set[int] = set()
    while True:
        budget = density * sum(sizes) - sum(sizes[i] for i in full)
        free = [i for i in range(len(shapes)) if i not in full and raw[i] > 0]
        weight = sum(raw[i] * sizes[i] for i in free)
        scale = budget / weight if weight else 0.0
        overfull = {i for i in free if scale * raw[i] > 1}
        if not overfull:
            return [1.0 if i in full else scale * raw[i] for i in range(len(shapes))]
        full |= overfull


DISTRIBUTIONS = {"uniform": uniform, "erk": erk}


def layer_densities(shapes: Sequence[Shape], sparsity: float, distribution: str = "uniform") -> list[float]:
    """The density of each layer of `shapes`, (out, in) or (out, in, *kernel), at an overall `sparsity`.

    Raises `ValueError` for an unknown distribution or a sparsity outside [0, 1).

    >>> layer_densities([(100, 784), (10, 100)], sparsity=0.9, distribution="erk")
    [0.0900..., 0.8786...]
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"expected distribution to be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if not (isinstance(sparsity, Real) and 0 <= sparsity < 1):
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity!r}; 0.9 keeps one connection in ten")
    return DISTRIBUTIONS[distribution](shapes, 1 - sparsity)
