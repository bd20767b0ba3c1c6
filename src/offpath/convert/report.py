"""What a conversion did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def percent(share: float) -> str:
    """As few digits as say what it is.

    >>> percent(0.5), percent(0.999)
    ('50%', '99.9%')
    """
    return f"{100 * share:.6g}%"


@dataclass(frozen=True)
class LayerReport:
    """One converted layer: `shape` is (out, in), the bytes are those of parameters and buffers."""

    name: str
    shape: tuple[int, int]
    nnz: int
    bytes_before: int
    bytes_after: int

    @property
    def sparsity(self) -> float:
        """Share of the (out, in) positions without a connection."""
        positions = self.shape[0] * self.shape[1]
        return 1 - self.nnz / positions if positions else 1.0


@dataclass(frozen=True)
class ConversionReport:
    """The layers that a conversion swapped, and those it left alone with the reason. Prints as a table."""

    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def nnz(self) -> int:
        """Connections of all converted layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Overall sparsity of the converted layers."""
        positions = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 1 - self.nnz / positions if positions else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of parameters and buffers of the layers before they were converted."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of parameters and buffers of the layers that took their place."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "shape (out x in)", "nnz", "sparsity", "bytes before", "bytes after")]
        rows += [
            (
                layer.name,
                f"{layer.shape[0]} x {layer.shape[1]}",
                f"{layer.nnz:,}",
                f"{layer.sparsity:.2%}",
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
            )
            for layer in self.layers
        ]
        rows.append(
            (
                "total",
                "",
                f"{self.nnz:,}",
                f"{self.sparsity:.2%}",
                f"{self.bytes_before:,}",
                f"{self.bytes_after:,}",
            )
        )
        lines = aligned(rows)
        empty = [layer.name for layer in self.layers if layer.nnz == 0 < layer.shape[0] * layer.shape[1]]
        lines += [
            f"no connection is left: {name} (a lower sparsity, or distribution='erk', leaves some)" for name in empty
        ]
        lines += [f"left as it was: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    >>> aligned([("layer", "nnz"), ("0", "7,840")])
    ['layer    nnz', '0      7,840']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
