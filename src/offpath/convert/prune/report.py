"""What pruning did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from offpath.convert.report import aligned


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned layer: `shape` is that of its weight, `nnz` counts the weights that are not zero now."""

    name: str
    shape: tuple[int, ...]
    nnz: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1 - self.nnz / prod(self.shape)


@dataclass(frozen=True)
class PruneReport:
    """The layers that were pruned, in the order of the model, and those left alone with the reason.

    Prints as a table.
    """

    layers: tuple[PrunedLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def nnz(self) -> int:
        """Weights of all pruned layers that are not zero."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Overall sparsity of the pruned layers; 0 where there are none."""
        positions = sum(prod(layer.shape) for layer in self.layers)
        return 1 - self.nnz / positions if positions else 0.0

    def __str__(self) -> str:
        if not self.layers:
            return "\n".join(["no layer can be pruned: nothing was changed", *self._left_alone()])
        rows = [("layer", "weight", "nnz", "sparsity")]
        rows += [
            (layer.name, " x ".join(map(str, layer.shape)), f"{layer.nnz:,}", f"{layer.sparsity:.2%}")
            for layer in self.layers
        ]
        rows.append(("total", "", f"{self.nnz:,}", f"{self.sparsity:.2%}"))
        return "\n".join([*aligned(rows), *self._left_alone()])

    def _left_alone(self) -> list[str]:
        return [f"left as it was: {name} ({reason})" for name, reason in self.skipped]
