"""What `compress` measured and did, layer by layer and for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offpath.convert.report import aligned, percent


@dataclass(frozen=True)
class Measured:
    """Seconds of one call with an input of so many tokens, dense and sparse, and how many such calls a pass makes."""

    tokens: int
    calls: int
    dense_seconds: float
    sparse_seconds: float


@dataclass(frozen=True)
class CompressedLayer:
    """A layer that is mostly zero: what it takes dense and sparse, and which of both the model now has.

    `kind` is the dense layer's type, `becomes` the sparse one's; `shape` is (out, in). The bytes are those in memory:
    parameters, buffers, indices and the plans of the products that were measured; `bytes_at_most` with those of other
    numbers of tokens, in inference. `reason` says in numbers why it was swapped or not.
    """

    name: str
    kind: str
    becomes: str
    shape: tuple[int, int]
    nnz: int
    bytes_before: int
    bytes_after: int
    bytes_at_most: int
    measured: tuple[Measured, ...]
    swapped: bool
    reason: str

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return 1 - self.nnz / (self.shape[0] * self.shape[1])

    @property
    def dense_seconds(self) -> float:
        """Of all calls that were measured."""
        return sum(m.calls * m.dense_seconds for m in self.measured)

    @property
    def sparse_seconds(self) -> float:
        """Of all calls that were measured."""
        return sum(m.calls * m.sparse_seconds for m in self.measured)


@dataclass(frozen=True)
class CompressedEmbedding:
    """An embedding whose rows are int8 now; `shape` is (rows, width)."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class EndToEnd:
    """The whole model on the example.

    `predicted_seconds` is dense_seconds with the swapped layers' dense time replaced by their sparse time, and with the
    rest of the model as it was timed beside sparse layers, torch's encoders unfused; it is known before anything is
    swapped. `difference` is max ||dense - sparse|| / ||dense|| over the model's outputs, `bound` the same if each
    output of a swapped layer is moved by as much as both layers may round (and an int8 weight may be off), up or down
    at random, and at least one rounding of the outputs.
    """

    dense_seconds: float
    predicted_seconds: float
    measured_seconds: float
    difference: float
    bound: float

    @property
    def predicted_speedup(self) -> float:
        """How many times as fast the model was expected to get."""
        return self.dense_seconds / self.predicted_seconds

    @property
    def measured_speedup(self) -> float:
        """How many times as fast it got."""
        return self.dense_seconds / self.measured_seconds


@dataclass(frozen=True)
class CompressReport:
    """Prints as a table. `layers` are those that are mostly zero; `skipped` the others, each with the reason.

    `left_out` counts the layers that `filter_fn` did not take. `model_bytes_before` and `model_bytes_after` are those
    of the whole model: parameters, buffers, indices and plans.
    """

    min_sparsity: float
    layers: tuple[CompressedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    model_bytes_before: int
    model_bytes_after: int
    end_to_end: EndToEnd | None = None
    embeddings: tuple[CompressedEmbedding, ...] = ()
    left_out: int = 0

    @property
    def swapped(self) -> tuple[CompressedLayer, ...]:
        """The layers that are sparse now."""
        return tuple(layer for layer in self.layers if layer.swapped)

    @property
    def nnz(self) -> int:
        """Connections of all swapped layers."""
        return sum(layer.nnz for layer in self.swapped)

    @property
    def sparsity(self) -> float:
        """Overall sparsity of the swapped layers."""
        positions = sum(layer.shape[0] * layer.shape[1] for layer in self.swapped)
        return 1 - self.nnz / positions if positions else 0.0

    @property
    def bytes_before(self) -> int:
        """Bytes of the swapped layers before."""
        return sum(layer.bytes_before for layer in self.swapped)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layers that took their place."""
        return sum(layer.bytes_after for layer in self.swapped)

    @property
    def model_bytes_at_most(self) -> int:
        """Bytes of the whole model once it has computed with few tokens and with many, in inference."""
        return self.model_bytes_after + sum(layer.bytes_at_most - layer.bytes_after for layer in self.swapped)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"model_bytes_at_most": self.model_bytes_at_most}

    def __str__(self) -> str:
        lines = []
        if not self.layers and not self.skipped and self.left_out:
            lines.append(f"filter_fn took none of the {self.left_out} layers; it gets (module, name)")
        elif not self.layers:
            reasons, step = {reason for _, reason in self.skipped}, ""
            if NEEDS_EXAMPLE in reasons:
                step = "; give example= for those below that are"
            elif too_dense(self.min_sparsity) in reasons:
                step = "; prune first, with offpath.prune"
            lines.append(f"no layer that can be swapped is mostly zero (at least {percent(self.min_sparsity)})" + step)
        if self.swapped:
            lines += aligned([self._heading(), *map(self._row, self.swapped), self._total()])
        lines += [
            f"int8 embedding: {e.name}, {e.shape[0]} x {e.shape[1]}, {e.bytes_before:,} bytes before, "
            f"{e.bytes_after:,} after"
            for e in self.embeddings
        ]
        lines += [f"left as it was: {layer.name} ({layer.reason})" for layer in self.layers if not layer.swapped]
        for reason in dict.fromkeys(reason for _, reason in self.skipped):
            lines.append(f"left as it was: {', '.join(n for n, r in self.skipped if r == reason)} ({reason})")
        at_most = self.model_bytes_at_most
        beyond = f" (up to {at_most:,} with other numbers of tokens)" if at_most > self.model_bytes_after else ""
        lines.append(f"whole model: {self.model_bytes_before:,} bytes before, {self.model_bytes_after:,} after{beyond}")
        if self.end_to_end is not None:
            whole = self.end_to_end
            lines += [
                f"on the example: {_ms(whole.dense_seconds)} ms before, {_ms(whole.measured_seconds)} ms after, "
                f"{whole.measured_speedup:.2f} times as fast (predicted: {whole.predicted_speedup:.2f})",
                f"its outputs differ by {whole.difference:.1e} of their norm; the layers' bounds allow "
                f"{whole.bound:.1e}",
            ]
        return "\n".join(lines)

    def _inputs(self) -> list[int]:
        """What each pair of columns of times is for: a token count; -1 for all calls of the example."""
        if self.end_to_end is not None:
            return [-1]
        return list(dict.fromkeys(m.tokens for layer in self.swapped for m in layer.measured))

    def _heading(self) -> list[str]:
        columns = ["layer", "shape (out x in)", "nnz", "sparsity", "bytes before", "after"]
        for tokens in self._inputs():
            columns += [f"ms, {'the example' if tokens < 0 else tokens_in_words(tokens)}: before", "after"]
        return columns

    def _row(self, layer: CompressedLayer) -> list[str]:
        columns = [layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.nnz:,}", f"{layer.sparsity:.2%}"]
        return [*columns, f"{layer.bytes_before:,}", f"{layer.bytes_after:,}", *self._times([layer])]

    def _total(self) -> list[str]:
        columns = ["total", "", f"{self.nnz:,}", f"{self.sparsity:.2%}"]
        return [*columns, f"{self.bytes_before:,}", f"{self.bytes_after:,}", *self._times(self.swapped)]

    def _times(self, layers: Sequence[CompressedLayer]) -> list[str]:
        cells = []
        for tokens in self._inputs():
            chosen = [m for layer in layers for m in layer.measured if tokens in (-1, m.tokens)]
            cells += [
                _ms(sum(m.calls * m.dense_seconds for m in chosen)),
                _ms(sum(m.calls * m.sparse_seconds for m in chosen)),
            ]
        return cells


# Why a convolution stays that is mostly zero, where no example came.
NEEDS_EXAMPLE = "how large its images are only an example tells; give example="


def too_dense(min_sparsity: float) -> str:
    """Why a layer is left alone that is not mostly zero."""
    return f"less than {percent(min_sparsity)} of its weights are zero"


def tokens_in_words(tokens: int) -> str:
    """`1 token`, `256 tokens`."""
    return f"{tokens} token" + "s" * (tokens != 1)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
