"""The plots of the study of MiniLM: embeddings over sparsity, and what is gained for it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offpath.studies.compression.config import DENSE, GMP_
from offpath.studies.compression.result import StudyResult
from offpath.studies.compression.tables import DTYPES, MB, NAMES
from offpath.studies.plots import clean

COLORS = {DENSE: "#5c6370", "magnitude": "#e9a03b", "wanda": "#2a9d8f", "sparsegpt": "#5b6ee1", GMP_: "#d1495b"}
DTYPE_COLORS = {"float32": "#8a8f98", "bfloat16": "#d1495b"}


def figures(result: StudyResult) -> dict[str, Figure]:
    """By the name of its file: `quality` and `speed`, of what the study has."""
    found = {}
    if len(result.arms) > 1:
        found["quality"] = _quality(result)
    if result.times:
        found["speed"] = _speed(result)
    return found


def _quality(result: StudyResult) -> Figure:
    measures = (("rank_correlation", "rank correlation with dense", 1.0), ("retrieval", "retrieval (%)", 100.0))
    panels = [(name, *measure) for name in result.sources for measure in measures]
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for axes, (name, attribute, label, scale) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _curves(axes, result, name, attribute, scale)
        axes.set(xlabel="sparsity (%)", ylabel=label, title=name)
        axes.set_xticks([100 * sparsity for sparsity in result.config.sparsities])
        clean(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _curves(axes: Axes, result: StudyResult, name: str, attribute: str, scale: float) -> None:
    for method in (*result.config.methods, GMP_):
        arms = [arm for sparsity in result.config.sparsities if (arm := result.arm(method, sparsity))]
        values = [scale * getattr(arm.tests[name], attribute) for arm in arms]
        axes.plot(
            [100 * arm.sparsity for arm in arms], values, marker="o", markersize=4, color=COLORS[method],
            label=NAMES[method],
        )  # fmt: skip
    dense = result.arm(DENSE, 0.0)
    if dense is not None:
        value = scale * getattr(dense.tests[name], attribute)
        axes.axhline(value, color=COLORS[DENSE], linewidth=1.2, linestyle="--", label=NAMES[DENSE])
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _speed(result: StudyResult) -> Figure:
    """Bars in pairs, fp32 and bf16, for each sparsity: the time of each input, and the file."""
    panels = [*result.times, "file"]
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for version in result.versions:
            place = (0.0, *result.config.sparsities).index(version.sparsity)
            shift = 0.2 if version.dtype == "bfloat16" else -0.2
            value = version.file_bytes / MB if panel == "file" else 1e3 * result.times[panel][version.name]
            axes.bar(
                place + shift, value, 0.38, color=DTYPE_COLORS[version.dtype],
                label=DTYPES[version.dtype] if not version.sparsity else None,
            )  # fmt: skip
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
                (place + shift, value),
                ha="center",
                va="bottom",
                fontsize="x-small",
            )
        names = ["dense", *(f"{sparsity:.0%}" for sparsity in result.config.sparsities)]
        axes.set_xticks(range(len(names)), names)
        texts, _, tokens = panel.partition("x")
        title = "file" if panel == "file" else f"{texts} x {tokens} tokens"
        axes.set(title=title, ylabel="MB" if panel == "file" else "ms a call")
        clean(axes)
    figure.axes[0].legend(frameon=False)
    return figure
