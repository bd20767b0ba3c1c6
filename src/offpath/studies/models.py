"""The named models that the commands train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from offpath.convert import fuse, sparsify


def mlp(hidden: Sequence[int]) -> Callable[[int, int], nn.Sequential]:
    """Builds MLPs with these hidden layers and ReLU between."""

    def build(features: int, classes: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([features, *hidden]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))

    return build


# Name: (features, classes) -> the dense model.
MODELS: dict[str, Callable[[int, int], nn.Sequential]] = {
    "mlp-small": mlp([256, 256]),
    "mlp": mlp([1024, 1024]),
    "mlp-wide": mlp([4000, 1000, 4000]),  # the SET-MLP of Mocanu et al., 2018
}


def build_model(
    name: str, features: int, classes: int, sparsity: float, distribution: str, seed: int, all_connections: bool = False
) -> nn.Module:
    """The model `name`, its hidden layers at `sparsity` (0: dense); the small classifier stays dense.

    With `all_connections`, the hidden layers are sparse layers that have every connection and the dense weights.
    """
    model = MODELS[name](features, classes)
    if sparsity > 0:
        classifier = model[-1]
        start, method = (0.0, "magnitude") if all_connections else (sparsity, "random")
        sparsify(model, start, distribution, lambda module, _: module is not classifier, method, seed)
        fuse(model)
    return model
