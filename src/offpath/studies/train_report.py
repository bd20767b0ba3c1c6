"""`report.html` of one run: one self-contained page, made from the files in the run's folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from offpath.cost import this_machine
from offpath.studies.config import RunError
from offpath.studies.folder import RunFolder
from offpath.studies.page import write_page
from offpath.studies.plots import to_svg
from offpath.studies.train_plots import train_figures

HEADER = ("layer", "connections", "sparsity", "moved", "explored", "dead units", "new units")


def write_report(folder: Path) -> None:
    """Write `report.html` into the run's `folder`.

    Raises `RunError` when no epoch has been finished there, or when the page cannot be written.
    """
    run = RunFolder(folder)
    config, records = run.config(), run.metrics()
    if not records:
        raise RunError(f"expected a finished epoch in {run.metrics_file}, found none; go on with the run by --resume")
    topology = records[-1].get("topology")
    moved = [record["topology"] for record in records if "topology" in record]
    write_page(
        folder / "report.html",
        "train_report.html.jinja",
        machine=asdict(this_machine(config.device if config.sparsity else "cpu")),
        config=config.to_json(),
        last=records[-1],
        totals={name: sum(state[name] for state in moved) for name in ("updates", "dropped", "grown")},
        header=HEADER,
        rows=layer_rows(topology) if topology else [],
        figures={title: to_svg(figure, salt=title) for title, figure in train_figures(config, records).items()},
    )


def layer_rows(topology: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each sparse layer as it is in the record `topology`, under `HEADER`."""
    return [
        (
            layer["name"],
            f"{layer['nnz']:,}",
            f"{layer['sparsity']:.2%}",
            f"{1 - layer['unmoved'] / max(layer['nnz'], 1):.2%}",
            f"{layer['explored'] / max(layer['size'], 1):.2%}",
            f"{layer['dead_units']:,}",
            f"{layer['new_units']:,}",
        )
        for layer in topology["layers"]
    ]
