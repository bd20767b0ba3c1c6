"""The plots of autoencoders: what they explain, with how many latents, at what cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offpath.studies.plots import COLORS, clean
from offpath.studies.sae.race import SaeLane, SaeRaceResult
from offpath.studies.sae.run import FREQUENCY_DECADES

Record = dict[str, Any]


def train_figures(records: list[Record]) -> dict[str, Figure]:
    """One figure for each plot of a run, by what it shows."""
    return _figures(
        {
            "explained variance over epochs": lambda axes: _explained(axes, records),
            "latents that are dead": lambda axes: _dead(axes, records),
            "how often a latent fires": lambda axes: _frequencies(axes, records[-1]),
        }
    )


def race_figures(result: SaeRaceResult) -> dict[str, Figure]:
    """One figure for each plot of a race, by what it shows."""
    lanes = (result.dense, result.sparse)
    return _figures(
        {
            "explained variance over training time": lambda axes: _over_time(axes, lanes),
            f"one training step: {result.step_speedup:.2f}x": lambda axes: _steps(axes, lanes),
            "peak memory of training": lambda axes: _memory(axes, lanes),
        }
    )


def _figures(draws: dict[str, Callable[[Axes], None]]) -> dict[str, Figure]:
    figures = {}
    for title, draw in draws.items():
        figures[title] = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figures[title].subplots()
        draw(axes)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
        clean(axes)
    return figures


def _explained(axes: Axes, records: list[Record]) -> None:
    epochs = [record["epoch"] for record in records]
    for name, style in (("train", ":"), ("test", "-")):
        values = [100 * (1 - record[f"{name}_fvu"]) for record in records]
        axes.plot(epochs, values, style, marker="o", markersize=3, color=COLORS["sparse"], label=name)
    axes.set(xlabel="epoch", ylabel="explained variance (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dead(axes: Axes, records: list[Record]) -> None:
    epochs = [record["epoch"] for record in records]
    for name, label, style in (
        ("dead", "in a training epoch", "-"),
        ("never_fired_in_test", "never fired on the test part", ":"),
    ):
        values = [record[name] for record in records]
        axes.plot(epochs, values, style, marker="o", markersize=3, color=COLORS["sparse"], label=label)
    axes.set(xlabel="epoch", ylabel="latents", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _frequencies(axes: Axes, record: Record) -> None:
    counts = record["frequency_histogram"]
    lowest, highest = FREQUENCY_DECADES
    width = (highest - lowest) / len(counts)
    edges = [10 ** (lowest + width * number) for number in range(len(counts) + 1)]
    axes.stairs(counts, edges, fill=True, color=COLORS["sparse"])
    axes.set(xscale="log", xlabel="share of the test tokens on which it fires", ylabel="latents")


def _over_time(axes: Axes, lanes: tuple[SaeLane, ...]) -> None:
    for lane in lanes:
        seconds = list(accumulate(record["train_seconds"] for record in lane.epochs))
        values = [100 * record["explained_variance"] for record in lane.epochs]
        axes.plot(seconds, values, marker="o", markersize=3, color=COLORS[lane.name], label=lane.name)
    axes.set(xlabel="training time (s)", ylabel="explained variance (test, %)", xlim=(0, None))


def _steps(axes: Axes, lanes: tuple[SaeLane, ...]) -> None:
    _bars(axes, lanes, [lane.step_seconds_median * 1e3 for lane in lanes], "{:.1f} ms")
    for place, lane in enumerate(lanes):
        lower, upper = (1e3 * quartile for quartile in lane.step_seconds_quartiles)
        median = 1e3 * lane.step_seconds_median
        axes.errorbar(place, median, yerr=[[median - lower], [upper - median]], color="black", capsize=4)
    axes.set_ylabel("median step (ms), bars: quartiles")


def _memory(axes: Axes, lanes: tuple[SaeLane, ...]) -> None:
    _bars(axes, lanes, [lane.peak_memory_bytes / 2**20 for lane in lanes], "{:.0f} MiB")
    kept = lanes[0].bytes.total / 2**20
    axes.axhline(kept, color="black", linestyle=":", label="parameters, gradients and optimizer of either")
    axes.set(ylabel="MiB", ylim=(0, 1.3 * max(lane.peak_memory_bytes for lane in lanes) / 2**20))


def _bars(axes: Axes, lanes: tuple[SaeLane, ...], heights: list[float], text: str) -> None:
    for place, (lane, height) in enumerate(zip(lanes, heights, strict=True)):
        axes.bar(place, height, color=COLORS[lane.name], width=0.6)
        axes.annotate(text.format(height), (place, height / 2), ha="center", va="center", color="white")
    axes.set_xticks(range(len(lanes)), [lane.name for lane in lanes])
