"""The plots of one run: what it learned, and how its connections moved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offpath.studies.config import RunConfig
from offpath.studies.plots import COLORS, clean

LAYER_COLORS = ("#264653", "#2a9d8f", "#e9c46a", "#f4a261", "#e76f51")
Record = dict[str, Any]


def train_figures(config: RunConfig, records: list[Record]) -> dict[str, Figure]:
    """One figure for each plot, by what it shows; those of connections only where these move."""
    color = COLORS["sparse" if config.sparsity else "dense"]
    figures = {f"{q} over epochs": _figure(_quantity, records, q, color) for q in ("loss", "accuracy")}
    with_layers = [record for record in records if "topology" in record]
    if config.moves and with_layers:
        figures["layer densities over epochs"] = _figure(_densities, with_layers)
        figures["connections that have moved"] = _figure(_moved, with_layers)
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
        values = [record[f"{split}_{quantity}"] for record in records]
        axes.plot(epochs, values, style, color=color, label=split, marker=marker)
    axes.set_ylabel(quantity)
    if quantity == "loss":
        axes.set_yscale("log")


def _densities(axes: Axes, records: list[Record]) -> None:
    for epochs, layers, color in _layers_over_epochs(records):
        densities = [layer["nnz"] / layer["size"] for layer in layers]
        start = layers[0]["initial_nnz"] / layers[0]["size"]
        axes.plot([0, *epochs], [100 * d for d in (start, *densities)], color=color, label=layers[0]["name"])
    axes.set(ylabel="connections (% of positions)")
    axes.set_ylim(bottom=0)


def _moved(axes: Axes, records: list[Record]) -> None:
    for epochs, layers, color in _layers_over_epochs(records):
        shares = [1 - layer["unmoved"] / max(layer["nnz"], 1) for layer in layers]
        axes.plot([0, *epochs], [100 * s for s in (0.0, *shares)], color=color, label=layers[0]["name"])
    axes.set(ylabel="not there at the start (%)", ylim=(-2, 102))


def _layers_over_epochs(records: list[Record]) -> list[tuple[list[int], list[Record], str]]:
    """Of each layer: the epochs, its records, a colour."""
    epochs = [record["epoch"] for record in records]
    histories = zip(*(record["topology"]["layers"] for record in records), strict=True)
    return [(epochs, list(history), color) for history, color in zip(histories, cycle(LAYER_COLORS), strict=False)]
