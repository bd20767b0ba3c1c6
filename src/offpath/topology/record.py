"""What an update did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerUpdate:
    """One layer after an update. `unmoved` connections have existed without a break since the topology was made."""

    name: str
    dropped: int
    grown: int
    nnz: int
    size: int
    unmoved: int

    @property
    def sparsity(self) -> float:
        """Share of the (out, in) positions without a connection."""
        return 1 - self.nnz / self.size if self.size else 1.0


@dataclass(frozen=True)
class LayerState:
    """One layer at this moment. `initial_nnz` and `unmoved` look back to when the topology was made.

    A unit (a row of the weight) is dead without incoming connections, and new when it has some, none of which has
    existed since the start. `explored` positions have ever held a connection; None where that is not recorded.
    """

    name: str
    initial_nnz: int
    nnz: int
    size: int
    unmoved: int
    dead_units: int
    new_units: int
    explored: int | None = None

    @property
    def sparsity(self) -> float:
        """Share of the (out, in) positions without a connection."""
        return 1 - self.nnz / self.size if self.size else 1.0


@dataclass(frozen=True)
class TopologyUpdate:
    """One update, after optimizer step number `step`, layer by layer. `dataclasses.asdict` makes it JSON.

    >>> print(TopologyUpdate(100, (LayerUpdate("0", dropped=30, grown=30, nnz=100, size=1000, unmoved=70),)))
    step 100: 30 dropped and 30 grown in 1 layer; 100 connections (0.9 sparse), 70 of them unmoved
    """

    step: int
    layers: tuple[LayerUpdate, ...]

    @property
    def dropped(self) -> int:
        """Connections dropped in all layers."""
        return sum(layer.dropped for layer in self.layers)

    @property
    def grown(self) -> int:
        """Connections grown in all layers."""
        return sum(layer.grown for layer in self.layers)

    @property
    def nnz(self) -> int:
        """Connections of all layers after the update."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def unmoved(self) -> int:
        """Connections of all layers that have existed without a break since the topology was made."""
        return sum(layer.unmoved for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Sparsity of all layers together."""
        size = sum(layer.size for layer in self.layers)
        return 1 - self.nnz / size if size else 1.0

    def __str__(self) -> str:
        layers = f"{len(self.layers)} layer" + "s" * (len(self.layers) != 1)
        return (
            f"step {self.step}: {self.dropped:,} dropped and {self.grown:,} grown in {layers}; "
            f"{self.nnz:,} connections ({self.sparsity:.4g} sparse), {self.unmoved:,} of them unmoved"
        )
