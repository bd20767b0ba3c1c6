"""The plots of one run: what it learned, and how its connections moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from offpath.studies.config import RunConfig
from offpath.studies.plots import COLORS, clean

# Of each layer; the dashes let a line show that lies below another one.
LAYER_LINES = tuple(
    zip(("#264653", "#2a9d8f", "#e9c46a", "#f4a261", "#e76f51"), ("-", "--", "-.", ":", "-"), strict=True)
)
Record = dict[str, Any]


def train_figures(config: RunConfig, records: list[Record]) -> dict[str, Figure]:
    """One figure for each plot, by what it shows; those of connections only where these move."""
    color = COLORS["sparse" if config.sparsity else "dense"]
    figures = {f"{q} over epochs": _figure(_quantity, records, q, color) for q in ("loss", "accuracy")}
    with_layers = [record for record in records if "topology" in record]
    if config.moves and with_layers:
        density = partial(_of_positions, count="nnz", name="connections")
        explored = partial(_of_positions, count="explored", name="ever a connection")
        figures["layer densities over epochs"] = _figure(density, with_layers)
        figures["connections that have moved"] = _figure(_moved, with_layers)
        figures["positions explored"] = _figure(explored, with_layers)
    for title, figure in figures.items():
        axes = figure.axes[0]
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize="small")
        clean(axes)
    return figures


def _figure(draw: Callable[..., None], *values: Any) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    draw(figure.subplots(), *values)
    return figure


def _quantity(axes: Axes, records: list[Record], quantity: str, color: str) -> None:
    epochs = [record["epoch"] for record in records]
    for split, style in (("train", ":"), ("test", "-")):
        marker = "o" if len(epochs) == 1 else None  # a single epoch makes no line
        scale = 100 if quantity == "accuracy" else 1
        values = [scale * record[f"{split}_{quantity}"] for record in records]
        axes.plot(epochs, values, style, color=color, label=split, marker=marker)
    axes.set_ylabel("accuracy (%)" if quantity == "accuracy" else quantity)
    if quantity == "loss":
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(_PlainNumbers(minor_thresholds=(2, 0.4)))


class _PlainNumbers(LogFormatter):
    """0.6 instead of 6 times a power of ten; which ticks get a number stays as it is."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _moved(axes: Axes, records: list[Record]) -> None:
    _layer_lines(axes, records, lambda layers: [0.0, *(1 - x["unmoved"] / max(x["nnz"], 1) for x in layers)])
    axes.set(ylabel="not there at the start (%)", ylim=(-2, 102))


def _of_positions(axes: Axes, records: list[Record], count: str, name: str) -> None:
    def share(layers: list[Record]) -> list[float]:
        return [n / layers[0]["size"] for n in (layers[0]["initial_nnz"], *(x[count] for x in layers))]

    _layer_lines(axes, records, share)
    axes.set_ylabel(f"{name} (% of positions)")
    _from_zero(axes)


def _layer_lines(axes: Axes, records: list[Record], shares: Callable[[list[Record]], list[float]]) -> None:
    """A line for each layer: the start, then the end of each epoch."""
    epochs = [0, *(record["epoch"] for record in records)]
    histories = zip(*(record["topology"]["layers"] for record in records), strict=True)
    for layers, (color, style) in zip(histories, cycle(LAYER_LINES), strict=False):
        values = [100 * share for share in shares(list(layers))]
        axes.plot(epochs, values, style, color=color, label=f"layer {layers[0]['name']}")


def _from_zero(axes: Axes) -> None:
    """Also room above: a line along the frame would not be seen."""
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
