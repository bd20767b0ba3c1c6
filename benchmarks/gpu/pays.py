"""The table of docs/gpu.md: where sparsity pays on a GPU, measured where somebody has measured it, else calculated.

What is calculated is the best that any kernel could do: the bytes and operations that the work cannot do without, at
the rates of a card. Kernels stay below it; how far, only a measurement can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import decode, expand, live, step, tiles, topk
from gpu.card import line
from gpu.part import PARTS
from gpu.sheet import figure_of
from verdicts import Figure, in_words


@dataclass(frozen=True)
class Rates:
    """What a card does in a second. An H200: NVIDIA says 4.8 TB/s and 990 TFLOP/s; copies and products come to less."""

    name: str = "H200"
    moved_bytes: float = 4.3e12
    bf16_flops: float = 790e12
    multiprocessors: int = 132
    clock_hertz: float = 1.98e9

    @property
    def fp32_flops(self) -> float:
        return self.multiprocessors * self.clock_hertz * 128 * 2

    @property
    def gathered_bytes(self) -> float:
        """What the first-level caches deliver: 128 bytes a clock each."""
        return self.multiprocessors * self.clock_hertz * 128


@dataclass(frozen=True)
class Row:
    """One line: a figure of the run, in words, and the best that is possible."""

    work: str
    setting: str
    place: tuple[str, str, str]  # section, row and column of the figure
    best: Callable[[Rates], float]


def rows() -> Iterator[Row]:
    """Where it can pay, and beside it where it stops to."""
    for latents, k, width, tokens in topk.SIZES:
        name = f"{latents} latents, k={k}, width {width}, {tokens} tokens"
        setting = f"{latents:,} latents, {k} of them live, {tokens} tokens of width {width}"
        for direction, best in (("forward", _topk_forward(latents, k, tokens)), ("backward", _topk_backward(tokens))):
            place = topk.SECTION, f"{direction}, {name}", topk.OVER_DENSE
            yield Row(f"Top-k decoder, {direction}, over dense bf16", setting, place, best)
    shape = decode.words(decode.BARRED_SHAPE)
    for tokens in (1, 4, 8):
        for sparsity in decode.SPARSITIES if tokens == 1 else (0.7, 0.9):
            place = decode.section(tokens), shape, f"{sparsity:.0%}"
            setting = f"{shape}, {sparsity:.0%} sparse, {_tokens(tokens)}"
            yield Row("Sparse weight, decoding, over dense bf16", setting, place, _decode(sparsity))
    for tokens in tiles.TOKENS:
        for sparsity in (0.5, 0.7, 0.9):
            place = tiles.section(tokens), shape, f"{sparsity:.0%}"
            setting = f"{shape}, {sparsity:.0%} sparse, {_tokens(tokens)}"
            yield Row("Sparse weight in tiles, over dense bf16", setting, place, _tiled(sparsity, tokens))
    for dead in (0.0, 0.5, 0.7, 0.9):
        place = live.section(1), shape, f"{dead:.0%} zero"
        setting = f"{shape}, {dead:.0%} of the inputs zero, 1 token"
        yield Row("Sparse input, dense weight, over dense bf16", setting, place, lambda _, dead=dead: 1 / (1 - dead))
    width, tokens = step.SIZE
    for ours, over, element_bytes in ((step.OURS_FP32, step.FP32, 4), (step.OURS_BF16, step.BF16, 2)):
        for sparsity in step.SPARSITIES:
            place = step.SECTION, f"{ours} over {over}", f"{sparsity:.0%}"
            setting = f"{width} x {width}, {sparsity:.0%} sparse, {tokens} tokens"
            yield Row(f"Training step, over {over}", setting, place, _step(sparsity, element_bytes))
    for tokens in sorted(expand.TOKENS):
        place = expand.PRODUCT, f"{shape} at 50%", f"{tokens} tokens"
        setting = f"{shape}, 50% sparse, {tokens} tokens"
        yield Row("Weight written out for a dense product, over dense bf16", setting, place, _written_out(0.5, tokens))


def block(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table; `results` has the report of a run for each file in docs/bars/ that holds one."""
    rates = Rates()
    cards = {name: content["card"] for name, content in results.items()}
    found = {name: {_place(f): f for f in map(figure_of, content["figures"])} for name, content in results.items()}
    head = [
        "Work",
        "Setting",
        f"calculated: at best on an {rates.name}",
        *(f"measured on {c['name']}" for c in cards.values()),
    ]
    lines = [_line(head), _line(["---", "---", *["---:"] * (1 + len(cards))])]
    for row in rows():
        cells = [_cell(figures.get(row.place)) for figures in found.values()]
        lines.append(_line([row.work, row.setting, in_words(row.best(rates)), *cells]))
    lines.append("")
    for name, card in cards.items():
        lines.append(f"Measured by `make gpu` ([every figure](bars/{name}.txt)): {line(card)}.")
    if not cards:
        lines.append("Nothing has been measured on a GPU yet: every figure is calculated, and none is a promise.")
    return "\n".join(lines)


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether a report is one of all parts on a GPU: another would take figures from the page."""
    return not content["quick"] and "name" in content["card"] and content["parts"].keys() == set(PARTS)


def slug(card: Mapping[str, Any]) -> str:
    """What the files of a card are called in docs/bars/.

    >>> slug({"name": "NVIDIA H100 80GB HBM3"})
    'gpu-nvidia-h100-80gb-hbm3'
    """
    return "gpu-" + "-".join("".join(c if c.isalnum() else " " for c in card["name"].lower()).split())


def committed(folder: Path) -> list[Path]:
    """The reports in docs/bars/, in the order of their names."""
    return sorted(folder.glob("gpu-*.json"))


def _topk_forward(latents: int, k: int, tokens: int) -> Callable[[Rates], float]:
    # Two operations for each latent and token; two bytes of each weight that is read, once: a cache may hold it then.
    named = 1 - (1 - k / latents) ** tokens
    return lambda rates: (2 * tokens / rates.bf16_flops) / (2 * named / rates.moved_bytes)


def _topk_backward(tokens: int) -> Callable[[Rates], float]:
    # Of each weight four operations a token; its two bytes are read once, and as many written.
    return lambda rates: (4 * tokens / rates.bf16_flops) / (4 / rates.moved_bytes)


def _decode(sparsity: float) -> Callable[[Rates], float]:
    density = 1 - sparsity
    fillers = sparsity**16 / (1 - sparsity**16)
    n4_bytes, c16_bytes = 2.75 * density * (1 + fillers), 4 * density
    return lambda _: 2 / min(n4_bytes, c16_bytes)


def _tiled(sparsity: float, tokens: int) -> Callable[[Rates], float]:
    # Multiplied as if it were dense; only what is read is less.
    def best(rates: Rates) -> float:
        multiplied = 2 * tokens / rates.bf16_flops
        read = 2.75 * (1 - sparsity) * (1 + sparsity**16 / (1 - sparsity**16)) / rates.moved_bytes
        return max(2 / rates.moved_bytes, multiplied) / max(read, multiplied)

    return best


def _step(sparsity: float, element_bytes: int) -> Callable[[Rates], float]:
    # Each multiply-add of a connection gathers an element from a first-level cache.
    def best(rates: Rates) -> float:
        dense_flops = rates.fp32_flops if element_bytes == 4 else rates.bf16_flops
        return 2 * rates.gathered_bytes / element_bytes / dense_flops / (1 - sparsity)

    return best


def _written_out(sparsity: float, tokens: int) -> Callable[[Rates], float]:
    def best(rates: Rates) -> float:
        product = max(2 * tokens / rates.bf16_flops, 2 / rates.moved_bytes)
        written = (2 * (1 - sparsity) + 0.25 + 2) / rates.moved_bytes  # values, bits and offsets; the dense weight
        return product / (product + written)

    return best


def _place(figure: Figure) -> tuple[str, str, str]:
    return figure.section, figure.row, figure.column


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.refused is not None:
        return "not measured"
    return in_words(figure.value)


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
