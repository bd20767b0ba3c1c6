"""The plots of a study: accuracy over sparsity, and the loss of a text over steps and over seconds."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offpath.studies.plots import clean
from offpath.studies.table import percent
from offpath.studies.topology.config import (
    DENSE,
    GMP_,
    MEAN_METHODS,
    RIGL,
    RIGL_MEAN,
    SET_,
    SET_MEAN,
    SMALL_DENSE,
    STATIC,
    Arm,
    TaskConfig,
)
from offpath.studies.topology.result import CURVE, Cell, StudyResult
from offpath.studies.topology.tables import NAMES, arm_name

COLORS = {
    DENSE: "#5c6370", SMALL_DENSE: "#a9afb9", STATIC: "#e9a03b", SET_: "#2a9d8f", RIGL: "#d1495b", GMP_: "#5b6ee1",
    SET_MEAN: "#125c53", RIGL_MEAN: "#7d1f30",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")
STEP, LOSS = CURVE.index("step"), CURVE.index("loss")


def figures(result: StudyResult) -> dict[str, Figure]:
    """By the name of its file: `images` and `text`, of what the study has."""
    found = {}
    for kind, draw in (("images", _accuracy), ("text", _loss)):
        tasks = [task for task in result.config.tasks if task.kind == kind and _cells(result, task)]
        axis = {"images": ("sparsity",), "text": ("steps", "seconds")}[kind]
        panels = [(task, over) for task in tasks for over in axis if over != "seconds" or task.name in result.steps]
        if panels:
            figure = Figure(figsize=(5.6 * len(panels), 4), layout="constrained")
            for axes, (task, over) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                draw(axes, result, task, over)
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
            found[kind] = figure
    return found


def _cells(result: StudyResult, task: TaskConfig) -> list[Cell]:
    return [cell for arm in task.arms if (cell := result.cell(task.name, arm)) is not None]


def _accuracy(axes: Axes, result: StudyResult, task: TaskConfig, over: str) -> None:
    """Sparsities stand side by side, evenly, and methods within one a little apart so that their bars can be told."""
    cells = _cells(result, task)
    sparsities = sorted({cell.arm.sparsity for cell in cells if cell.arm.sparsity})
    dense = result.cell(task.name, Arm(DENSE))
    if dense is not None:
        axes.axhline(100 * dense.mean, color=COLORS[DENSE], linewidth=1.2, label=NAMES[DENSE])
        low, high = 100 * (dense.mean - dense.deviation), 100 * (dense.mean + dense.deviation)
        axes.axhspan(low, high, color=COLORS[DENSE], alpha=0.15, linewidth=0)
    methods = [method for method in NAMES if any(c.arm.method == method and c.arm.sparsity for c in cells)]
    for number, method in enumerate(methods):
        own = [cell for cell in cells if cell.arm.method == method]
        places = [sparsities.index(cell.arm.sparsity) + 0.07 * (number - (len(methods) - 1) / 2) for cell in own]
        means, deviations = [100 * cell.mean for cell in own], [100 * cell.deviation for cell in own]
        style = "--" if method == SMALL_DENSE else ":" if method in MEAN_METHODS else "-"
        axes.errorbar(
            places, means, yerr=deviations, fmt=style, marker="o", markersize=4, capsize=3, linewidth=1.2,
            color=COLORS[method], label=NAMES[method],
        )  # fmt: skip
    axes.set_xticks(range(len(sparsities)), [percent(sparsity) for sparsity in sparsities])
    axes.set(xlabel=over, ylabel="test accuracy (%)", title=result.title(task.name), xlim=(-0.5, len(sparsities) - 0.5))
    clean(axes)


def _loss(axes: Axes, result: StudyResult, task: TaskConfig, over: str) -> None:
    """The mean of the seeds at each point, and a band of their standard deviation."""
    sparsities = sorted({arm.sparsity for arm in task.arms})
    for cell in _cells(result, task):
        seconds = result.seconds_per_step(task.name, cell.arm) if over == "seconds" else 1.0
        assert seconds is not None
        points = list(zip(*cell.curves.values(), strict=True))
        at = [seconds * float(seeds[0][STEP] or 0) for seeds in points]
        losses = [[float(seed[LOSS] or 0) for seed in seeds] for seeds in points]
        means = [statistics.mean(values) for values in losses]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses]
        color, style = COLORS[cell.arm.method], STYLES[max(0, sparsities.index(cell.arm.sparsity) - 1)]
        axes.plot(at, means, style, color=color, linewidth=1.3, label=arm_name(cell.arm))
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel=over if over == "steps" else "seconds of training", ylabel="held-out loss (nats a character)")
    axes.set(title=f"{result.title(task.name)}: loss over {over}")
    clean(axes)
