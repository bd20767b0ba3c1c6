"""`report.html` of a study, and its plots beside it."""

from __future__ import annotations

from pathlib import Path

from offpath.studies.files import write_text
from offpath.studies.page import write_page
from offpath.studies.plots import to_svg
from offpath.studies.topology.plots import figures
from offpath.studies.topology.result import StudyResult
from offpath.studies.topology.tables import tables


def write_report(result: StudyResult, folder: Path) -> None:
    """Write `report.html` and a file for each plot into `folder`. Raises `RunError` when they cannot be written."""
    plots = {name: to_svg(figure, salt=name) for name, figure in figures(result).items()}
    for name, plot in plots.items():
        write_text(folder / f"{name}.svg", plot)
    machines = [entry["machine"] for entry in result.steps.values()]
    write_page(
        folder / "report.html",
        "topology/report.html.jinja",
        machine=machines[0] if machines else {"isas": {}},
        result=result,
        tables=tables(result),
        figures=plots,
    )
