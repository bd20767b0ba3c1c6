"""What `offpath bench` measured: its table and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from offpath.studies.page import write_page
from offpath.studies.plots import clean, to_svg
from offpath.studies.table import Table

MB = 1e6
COLORS = ("#8a8f98", "#5b6ee1", "#d1495b")
MEASURES = {
    "rank_correlation": ("rank correlation", "{:.3f}"),
    "retrieval": ("retrieval", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
}


def table(result: dict[str, Any]) -> Table:
    """A row for each version of the model."""
    versions = result["versions"]
    measures = list(next(iter(versions.values()))["accuracy"])
    (one, few), (texts, tokens) = result["points"]["latency"], result["points"]["throughput"]
    header = ("", "file", f"{one} x {few} tokens", "speed-up", f"{texts} x {tokens} tokens", "texts/s", "speed-up")
    dense = next(iter(versions.values()))
    rows = []
    for name, version in versions.items():
        latency, throughput = (version[f"{point}_seconds"]["median"] for point in ("latency", "throughput"))
        rows.append(
            (
                name,
                f"{version['file_bytes'] / MB:.1f} MB",
                f"{1e3 * latency:.2f} ms",
                f"{dense['latency_seconds']['median'] / latency:.2f}x",
                f"{1e3 * throughput:.1f} ms",
                f"{texts / throughput:,.1f}",
                f"{dense['throughput_seconds']['median'] / throughput:.2f}x",
                *(MEASURES[measure][1].format(version["accuracy"][measure]) for measure in measures),
            )
        )
    title = f"Dense and sparse; tested on {result['task']['name']}"
    return Table(title, (*header, *(MEASURES[measure][0] for measure in measures)), rows)


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `report.html` into `folder`. Raises `RunError` when it cannot be written."""
    write_page(
        folder / "report.html",
        "compression/bench.html.jinja",
        machine=result["machine"],
        result=result,
        tables=[table(result)],
        figures={"time and file": to_svg(_bars(result), salt="bars")},
    )


def _bars(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    versions = result["versions"]
    panels = [
        (f"{texts} x {tokens} tokens", "ms", [1e3 * v[f"{point}_seconds"]["median"] for v in versions.values()])
        for point, (texts, tokens) in result["points"].items()
    ]
    panels.append(("file", "MB", [version["file_bytes"] / MB for version in versions.values()]))
    for axes, (title, unit, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.bar(range(len(values)), values, color=COLORS, width=0.6)
        for place, value in enumerate(values):
            axes.annotate(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", (place, value), ha="center", va="bottom")
        axes.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in versions])
        axes.set(title=title, ylabel=unit)
        clean(axes)
    return figure
