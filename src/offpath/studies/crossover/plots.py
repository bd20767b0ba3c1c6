"""The plots of a crossover: speed-up over sparsity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from offpath.cost.crossover import DENSE, OFFPATH, PRODUCTS, TORCH_SPARSE, Case, Point
from offpath.studies.crossover.result import CrossoverResult
from offpath.studies.crossover.tables import NAMES, Block
from offpath.studies.table import percent

SPARSE_COLOR, REFERENCE_COLOR, LIMIT_COLOR = "#d1495b", "#4a6fa5", "#1d2129"
BATCH_COLORS = ("#f0a6ae", "#e0737f", "#d1495b", "#8f2334", "#5a1420", "#2e0a10")
CURVE_STEPS = 100
# One batch stands for all in the first figure: this one where it was measured.
MAIN_BATCH = 256
SPEEDUP_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
LINES = (  # product, method, style, width
    ("step", OFFPATH, "-", 2.2),
    ("forward", OFFPATH, "--", 1.4),
    ("step", TORCH_SPARSE, "-", 2.2),
    ("forward", TORCH_SPARSE, "--", 1.4),
)


def main_batch(result: CrossoverResult) -> int:
    """The batch that the first figure shows: 256, or else the largest that was measured."""
    batches = [case.batch for case in result.cases()]
    return MAIN_BATCH if MAIN_BATCH in batches else max(batches)


def main_caption(result: CrossoverResult) -> str:
    """What the first figure shows, in words."""
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in _best_rates(result).items())
    return (
        f"Batch {main_batch(result)}; speed-up over nn.Linear of the same dtype, bars: quartiles, dots: break-even "
        "(a triangle: already at the lowest sparsity measured). "
        "The limit 1/(1-s) is dense speed with only the work that is left; the dotted line is that limit for a "
        f"training step at the best rate seen in any measurement of the dtype here ({rates}), dense or sparse. "
        "It is no theoretical peak."
    )


def main_figure(result: CrossoverResult) -> Figure:
    """Training step and forward at one batch: a column for each shape, a row for each dtype that offpath computes."""
    batch = main_batch(result)
    cases = [case for case in result.cases() if case.batch == batch]
    shapes = list(dict.fromkeys((case.in_features, case.out_features) for case in cases))
    computed = {c.dtype for c in cases if any(p.speedup(OFFPATH) is not None for p in result.row(c))}
    dtypes = [dtype for dtype in result.config.dtypes if dtype in computed] or list(
        dict.fromkeys(c.dtype for c in cases)
    )
    figure = Figure(figsize=(max(7.0, 1.2 + 4.0 * len(shapes)), 1.0 + 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(shapes), squeeze=False, sharey=True)
    for row, dtype in zip(panels, dtypes, strict=True):
        for axes, (in_features, out_features) in zip(row, shapes, strict=True):
            for product, method, style, width in LINES:
                case = Case(in_features, out_features, dtype, product, batch)
                color = SPARSE_COLOR if method == OFFPATH else REFERENCE_COLOR
                label = f"{'offpath' if method == OFFPATH else 'torch.sparse'}, {NAMES[product]}"
                _line(axes, result, case, method, label=label, color=color, linestyle=style, linewidth=width)
            _mark(axes, result, Case(in_features, out_features, dtype, "step", batch))
            _limits(axes, result, Case(in_features, out_features, dtype, "step", batch))
            _finish(axes, result, f"{in_features} → {out_features}, {dtype}, batch {batch}")
    _share_legend(figure, panels.flat)
    figure.supylabel("speed-up over nn.Linear", fontsize="medium")
    return figure


def block_figure(result: CrossoverResult, block: Block) -> Figure:
    """One shape and dtype: a panel for each product, a line for each batch."""
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    panels = figure.subplots(1, len(PRODUCTS), squeeze=False, sharey=True)
    for axes, product in zip(panels.flat, PRODUCTS, strict=True):
        cases = sorted((case for case in block.cases if case.product == product), key=lambda case: case.batch)
        for case, color in zip(cases, _batch_colors(len(cases)), strict=True):
            label = f"offpath, batch {case.batch}"
            _line(axes, result, case, OFFPATH, label=label, color=color, linestyle="-", linewidth=1.8)
        if cases:
            label = f"torch.sparse, batch {cases[-1].batch}"
            color = REFERENCE_COLOR
            _line(axes, result, cases[-1], TORCH_SPARSE, label=label, color=color, linestyle="-", linewidth=1.4)
        _limit(axes, result)
        _finish(axes, result, NAMES[product])
    _share_legend(figure, panels.flat)
    return figure


def _line(
    axes: Axes,
    result: CrossoverResult,
    case: Case,
    method: str,
    *,
    label: str,
    color: str,
    linestyle: str,
    linewidth: float,
) -> None:
    """A curve with its quartiles and its break-even; nothing where nothing was measured."""
    points = [p for p in result.row(case) if p.speedup(method) is not None]
    if not points:
        return
    places, speedups = [_place(p.sparsity) for p in points], [p.speedup(method) or 0.0 for p in points]
    ends = [p.speedup_quartiles(method) or (0.0, 0.0) for p in points]
    errors = [
        [middle - low for middle, (low, _) in zip(speedups, ends, strict=True)],
        [high - middle for middle, (_, high) in zip(speedups, ends, strict=True)],
    ]
    axes.errorbar(
        places,
        speedups,
        yerr=[[max(error, 0.0) for error in side] for side in errors],
        label=label,
        color=color,
        linestyle=linestyle,
        linewidth=linewidth,
        elinewidth=0.8,
        capsize=1.5,
    )
    found = result.break_even(case, method)
    if found is not None and found.sparsity is not None:
        marker = "o" if found.found == "between" else "<"  # the latter: here or further to the left
        axes.plot(_place(found.sparsity), 1, marker, color=color, markersize=6, markeredgecolor="white", zorder=5)


def _mark(axes: Axes, result: CrossoverResult, case: Case) -> None:
    """Write the break-evens of one case beside their dots."""
    for method, color in ((OFFPATH, SPARSE_COLOR), (TORCH_SPARSE, REFERENCE_COLOR)):
        found = result.break_even(case, method)
        if found is not None and found.sparsity is not None:
            place = _place(found.sparsity), 1
            axes.annotate(
                str(found), place, (3, -4), textcoords="offset points", va="top", fontsize="small", color=color
            )


def _limits(axes: Axes, result: CrossoverResult, case: Case) -> None:
    _limit(axes, result)
    dense = [timing for point in result.row(case) if (timing := point.timing(DENSE))]
    best = _best_rates(result).get(case.dtype)
    if not dense or not best:
        return
    dense_rate = _operations(case, 0.0) / statistics.median(timing.median_seconds for timing in dense)
    sparsities = _all_sparsities(result)
    axes.plot(
        [_place(sparsity) for sparsity in sparsities],
        [best / dense_rate / (1 - sparsity) for sparsity in sparsities],
        ":",
        color=LIMIT_COLOR,
        linewidth=1.2,
        label="that limit at the best rate seen here",
    )


def _limit(axes: Axes, result: CrossoverResult) -> None:
    sparsities = _all_sparsities(result)
    limits = [1 / (1 - sparsity) for sparsity in sparsities]
    axes.plot([_place(s) for s in sparsities], limits, color=LIMIT_COLOR, linewidth=1, label="limit 1/(1-s)")


def _finish(axes: Axes, result: CrossoverResult, title: str) -> None:
    axes.axhline(1, color="#8a8f98", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(SPEEDUP_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xticks([_place(s) for s in result.config.sparsities], [percent(s) for s in result.config.sparsities])
    axes.tick_params(labelsize="small")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("sparsity", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _share_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    entries["break-even"] = Line2D([], [], linestyle="", marker="o", color="#8a8f98", markeredgecolor="white")
    labels = sorted(entries, key=lambda label: ("offpath" not in label, "torch" not in label))
    figure.legend(
        [entries[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=int(figure.get_figwidth() // 2.3),
        frameon=False,
        fontsize="small",
    )


def _place(sparsity: float) -> float:
    """Where a sparsity stands on the axis: nearly its logit, so that neither low nor high ones crowd; 0 has a place."""
    return math.log((sparsity + 0.05) / (1 - sparsity))


def _all_sparsities(result: CrossoverResult) -> list[float]:
    """From the lowest to the highest of the config, close enough to draw a curve."""
    low, high = result.config.sparsities[0], result.config.sparsities[-1]
    return [low + (high - low) * step / CURVE_STEPS for step in range(CURVE_STEPS + 1)]


def _batch_colors(count: int) -> Sequence[str]:
    return [BATCH_COLORS[min(place, len(BATCH_COLORS) - 1)] for place in range(count)]


def _operations(case: Case, sparsity: float) -> float:
    """Multiplications and additions that the connections ask for; a step has three such products."""
    products = 3 if case.product == "step" else 1
    return products * 2 * case.batch * case.in_features * case.out_features * (1 - sparsity)


def _best_rates(result: CrossoverResult) -> dict[str, float]:
    """By dtype, the most operations a second that any measurement reached, dense or sparse."""
    best: dict[str, float] = {}
    for point in result.points:
        for rate in _rates(point):
            best[point.case.dtype] = max(best.get(point.case.dtype, 0.0), rate)
    return best


def _rates(point: Point) -> Iterable[float]:
    for method, sparsity in ((DENSE, 0.0), (OFFPATH, point.sparsity)):
        timing = point.timing(method)
        if timing is not None:
            yield _operations(point.case, sparsity) / timing.median_seconds
