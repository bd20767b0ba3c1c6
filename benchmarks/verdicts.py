"""Measured figures beside their bars: met or missed, where it breaks even, and the tables that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

COLORS = {"met": "green", "missed": "red", "refused": "yellow"}


@dataclass(frozen=True)
class Figure:
    """One cell of a table: a speed-up ("x") or a sparsity ("%", as a share), its bar, or why there is none.

    `at_most` turns the bar round: smaller is better. `seconds` holds the medians that the value was made from, of the
    other and of offpath; `wrong` says that it was refused because the result was, or because there was none.
    """

    section: str
    row: str
    column: str
    bar: float | None = None
    value: float | None = None
    spread: float | None = None
    seconds: tuple[float, float] | None = None
    refused: str | None = None
    wrong: bool = False
    unit: str = "x"
    at_most: bool = False

    @property
    def verdict(self) -> str | None:
        """ "met", "missed", "refused", or None for a figure without a bar."""
        if self.refused is not None:
            return "refused"
        if self.bar is None:
            return None
        if self.value is None:
            return "missed"
        return "met" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "missed"


def break_even(ratios: Iterable[tuple[float, float]]) -> float | None:
    """The sparsity from which on the ratio stays at 1 or above, from (sparsity, ratio) pairs; None if it never does.

    Linear between two measured points; the lowest measured sparsity when the ratio is never below 1.

    >>> break_even([(0.2, 0.8), (0.4, 1.2), (0.6, 2.0)])
    0.3
    """
    points = sorted(ratios)
    below = [place for place, (_, ratio) in enumerate(points) if ratio < 1]
    if not points or (below and below[-1] == len(points) - 1):
        return None
    if not below:
        return points[0][0]
    (s0, r0), (s1, r1) = points[below[-1] : below[-1] + 2]
    return round(s0 + (1 - r0) / (r1 - r0) * (s1 - s0), 6)


def in_words(value: float | None, unit: str = "x") -> str:
    """A value as the tables print it: "2.41x", "12.6x", "35.2 %", or "never".

    Rounded to the worse side, so that a missed bar is not printed as the bar.
    """
    if value is None:
        return "never"
    if unit == "%":
        return f"{math.ceil(value * 1000 - 1e-9) / 10:.1f} %"
    digits = 1 if value >= 10 else 2
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}x"


def cell(figure: Figure) -> str:
    """Two lines: value and spread; bar and verdict."""
    verdict = figure.verdict
    if verdict == "refused":
        return "[yellow]refused[/]"
    spread = "" if figure.spread is None else f" ±{figure.spread:.0%}"
    first = in_words(figure.value, figure.unit) + spread
    if figure.bar is None:
        return first
    limit = "at most" if figure.at_most else "bar"
    bar = f"{figure.bar * 100:g} %" if figure.unit == "%" else f"{figure.bar:g}"
    return f"[bold]{first}[/]\n{limit} {bar} [{COLORS[str(verdict)]}]{verdict}[/]"


def table(figures: Sequence[Figure]) -> Table:
    """The figures of one section, in the order of their rows and columns."""
    result = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = list(dict.fromkeys(figure.column for figure in figures))
    result.add_column("")
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for row in dict.fromkeys(figure.row for figure in figures):
        cells = {figure.column: cell(figure) for figure in figures if figure.row == row}
        result.add_row(escape(row), *(cells.get(column, "") for column in columns))
    return result


def reasons(figures: Iterable[Figure]) -> list[str]:
    """Every reason for a refusal, once, with the sections that it holds in."""
    sections: dict[str, list[str]] = {}
    for figure in figures:
        if figure.refused is not None:
            sections.setdefault(figure.refused, []).append(figure.section)
    return [f"refused: {reason} (in: {'; '.join(dict.fromkeys(names))})" for reason, names in sections.items()]


def summary(figures: Iterable[Figure]) -> str:
    """How many bars were met, missed and refused."""
    verdicts = [figure.verdict for figure in figures if figure.bar is not None]
    counts = {name: verdicts.count(name) for name in COLORS}
    return f"{len(verdicts)} bars: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
