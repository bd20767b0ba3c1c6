"""The plots of a race, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import accumulate

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offpath.studies.race import Lane, RaceResult
from offpath.studies.table import percent

COLORS = {"dense": "#8a8f98", "sparse": "#d1495b"}
MILLISECONDS = 1e3
MIB = 2**20


def race_figure(result: RaceResult) -> Figure:
    """Test accuracy over training time, time a step, and the bytes that training keeps: one row of three plots."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (_accuracy_over_time, _step_time, _bytes_kept), strict=True):
        draw(axes, result)
    return figure


def report_figures(result: RaceResult) -> dict[str, Figure]:
    """The plots of the report, one figure each so that a narrow page can stack them; by what they show."""
    draws = (_accuracy_over_time, _step_time, _bytes_kept, _loss_over_epochs, _accuracy_over_epochs)
    figures = {}
    for draw in draws:
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes, result)
        figures[axes.get_title()] = figure
    return figures


def to_svg(figure: Figure, salt: str = "offpath") -> str:
    """The figure as an `<svg>` element that can stand inside a page; `salt` keeps its ids apart from others'."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _loss_over_epochs(axes: Axes, result: RaceResult) -> None:
    _over_epochs(axes, result, "loss")
    axes.set_yscale("log")


def _accuracy_over_epochs(axes: Axes, result: RaceResult) -> None:
    _over_epochs(axes, result, "accuracy")


def _over_epochs(axes: Axes, result: RaceResult, quantity: str) -> None:
    for lane in (result.dense, result.sparse):
        epochs = [record["epoch"] for record in lane.epochs]
        for split, style in (("train", ":"), ("test", "-")):
            values = [record[f"{split}_{quantity}"] for record in lane.epochs]
            axes.plot(epochs, values, style, color=COLORS[lane.name], label=f"{lane.name}, {split}")
    axes.set(xlabel="epoch", ylabel=quantity, title=f"{quantity} over epochs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    clean(axes)


def _accuracy_over_time(axes: Axes, result: RaceResult) -> None:
    for lane in (result.dense, result.sparse):
        seconds = list(accumulate(record["train_seconds"] for record in lane.epochs))
        accuracies = [100 * record["test_accuracy"] for record in lane.epochs]
        axes.plot(seconds, accuracies, marker="o", markersize=3, color=COLORS[lane.name], label=_label(lane))
    axes.set(xlabel="training time (s)", ylabel="test accuracy (%)", title="accuracy over training time")
    axes.legend(frameon=False, loc="lower right")
    clean(axes)


def _step_time(axes: Axes, result: RaceResult) -> None:
    def spread(lane: Lane) -> tuple[float, float]:
        lower, upper = lane.step_seconds_quartiles
        return lane.step_seconds_median - lower, upper - lane.step_seconds_median

    _bars(axes, result, lambda lane: lane.step_seconds_median * MILLISECONDS, "{:.2f} ms")
    for place, lane in enumerate((result.dense, result.sparse)):
        error = [[side * MILLISECONDS] for side in spread(lane)]
        axes.errorbar(place, lane.step_seconds_median * MILLISECONDS, yerr=error, color="black", capsize=4)
    axes.set(ylabel="median step (ms), bars: quartiles", title=f"one training step: {result.step_speedup:.2f}x")


def _bytes_kept(axes: Axes, result: RaceResult) -> None:
    lanes = (result.dense, result.sparse)
    bottom = [0.0, 0.0]
    for part, color in zip(
        ("parameters", "gradients", "optimizer", "pattern"), ("#264653", "#2a9d8f", "#e9c46a", "#e76f51"), strict=True
    ):
        heights = [getattr(lane.bytes, part) / MIB for lane in lanes]
        axes.bar([lane.name for lane in lanes], heights, bottom=bottom, color=color, label=part, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        axes.annotate(f"{total:.1f} MiB", (place, total), ha="center", va="bottom")
    axes.set(ylabel="MiB", title="bytes that training keeps", ylim=(0, 1.15 * max(bottom)))
    axes.legend(frameon=False)
    clean(axes)


def _bars(axes: Axes, result: RaceResult, value: Callable[[Lane], float], text: str) -> None:
    for place, lane in enumerate((result.dense, result.sparse)):
        axes.bar(place, value(lane), color=COLORS[lane.name], width=0.6)
        axes.annotate(text.format(value(lane)), (place, value(lane) / 2), ha="center", va="center", color="white")
    axes.set_xticks([0, 1], ["dense", "sparse"])
    clean(axes)


def _label(lane: Lane) -> str:
    return "dense" if lane.sparsity == 0 else f"{percent(lane.sparsity)} sparse"


def clean(axes: Axes) -> None:
    """Lines for reading values, and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
