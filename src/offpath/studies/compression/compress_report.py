"""What a compressed checkpoint came to: the tables of `offpath compress`, and its `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from offpath.studies.page import write_page
from offpath.studies.plots import clean, to_svg
from offpath.studies.table import Row, Table

MB = 1e6
COLORS = {True: "#d1495b", False: "#8a8f98"}


def summary(report: dict[str, Any]) -> Table:
    """What the whole model takes, before and after."""
    done, sizes = report["compress"], report["bytes"]
    swapped = sum(layer["swapped"] for layer in done["layers"])
    rows: list[Row] = [
        ("mostly zero layers made sparse", "", f"{swapped} of {len(done['layers'])}", ""),
        ("dtype of the weights", report["dtype"]["checkpoint"], report["dtype"]["saved"], ""),
        _megabytes("file", sizes["checkpoint"], sizes["file"]),
        _megabytes("memory", done["model_bytes_before"], done["model_bytes_after"]),
    ]
    if done["model_bytes_at_most"] > done["model_bytes_after"]:
        rows.append(
            _megabytes("  with other numbers of tokens", done["model_bytes_before"], done["model_bytes_at_most"])
        )
    whole = done["end_to_end"]
    if whole is not None:
        before, after = whole["dense_seconds"], whole["measured_seconds"]
        texts, tokens = report["example"]
        predicted = whole["predicted_seconds"]
        rows += [
            (f"{texts} x {tokens} tokens", f"{1e3 * before:.1f} ms", f"{1e3 * after:.1f} ms", f"{before / after:.2f}x"),
            ("predicted", "", f"{1e3 * predicted:.1f} ms", f"{before / predicted:.2f}x"),
            ("outputs differ by", "", f"{whole['difference']:.1e}", ""),
            ("  the bounds explain", "", f"{whole['bound']:.1e}", ""),
        ]
    return Table("The model", ("", "before", "after", "before / after"), rows)


def layers(report: dict[str, Any]) -> Table:
    """Each mostly zero layer, and why it was made sparse or not."""
    rows: list[Row] = [
        (
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            f"{1 - layer['nnz'] / (layer['shape'][0] * layer['shape'][1]):.2%}",
            f"{layer['bytes_before']:,}",
            f"{layer['bytes_after']:,}",
            layer["reason"],
        )
        for layer in report["compress"]["layers"]
    ]
    return Table("Layer by layer", ("layer", "shape", "sparsity", "bytes before", "after", ""), rows)


def left_alone(report: dict[str, Any]) -> Table:
    """What was not pruned, and what kept its kind without having been timed; and why."""
    pruned = report["prune"] or {"skipped": ()}
    rows: list[Row] = [("not pruned", *each) for each in pruned["skipped"]]
    rows += [("not changed", *each) for each in report["compress"]["skipped"]]
    return Table("Left as they were", ("", "layer", "reason"), rows)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.html` into `folder`. Raises `RunError` when it cannot be written."""
    write_page(
        folder / "report.html",
        "compression/compress.html.jinja",
        machine=report["machine"],
        report=report,
        tables=[table for table in (summary(report), layers(report), left_alone(report)) if table.rows],
        figures={"time of each layer": to_svg(_times(report), salt="times")} if report["compress"]["layers"] else {},
    )


def _megabytes(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before / MB:.1f} MB", f"{after / MB:.1f} MB", f"{before / after:.2f}x"


def _times(report: dict[str, Any]) -> Figure:
    """A bar for each layer: how many times as fast it is sparse, over all calls that were measured."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, layer in enumerate(report["compress"]["layers"]):
        dense = sum(m["calls"] * m["dense_seconds"] for m in layer["measured"])
        sparse = sum(m["calls"] * m["sparse_seconds"] for m in layer["measured"])
        axes.bar(place, dense / sparse, color=COLORS[layer["swapped"]])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="dense time / sparse time", title="time of each layer (grey: left dense)")
    clean(axes)
    return figure
