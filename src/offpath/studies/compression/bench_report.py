"""What `offpath bench` measured: its table and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from offpath.studies.page import write_page
from offpath.studies.plots import clean, to_svg
from offpath.studies.table import Row, Table

MB = 1e6
COLORS = ("#8a8f98", "#5b6ee1", "#d1495b")
MEASURES = {
    "rank_correlation": ("rank correlation", "{:.3f}"),
    "retrieval": ("retrieval", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
}


def table(result: dict[str, Any]) -> Table:
    """A column for each version of the model: so it fits a terminal of 80."""
    versions = list(result["versions"].values())
    rows: list[Row] = [("file", *(f"{version['file_bytes'] / MB:.1f} MB" for version in versions))]
    for point, (texts, tokens) in result["points"].items():
        seconds = [version[f"{point}_seconds"]["median"] for version in versions]
        rows += [
            (f"{texts} x {tokens} tokens", *(f"{1e3 * each:.2f} ms" for each in seconds)),
            ("  speed-up", *(f"{seconds[0] / each:.2f}x" for each in seconds)),
        ]
        if texts > 1:
            rows.append(("  texts/s", *(f"{texts / each:,.1f}" for each in seconds)))
    for measure in versions[0]["accuracy"]:
        name, form = MEASURES[measure]
        rows.append((name, *(form.format(version["accuracy"][measure]) for version in versions)))
    return Table(f"Dense and sparse; tested on {result['task']['name']}", ("", *result["versions"]), rows)


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
