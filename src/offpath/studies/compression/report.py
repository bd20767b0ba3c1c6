"""`report.html` of the study of MiniLM, and its plots beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from offpath.cost import this_machine
from offpath.studies.compression.plots import figures
from offpath.studies.compression.result import StudyResult
from offpath.studies.compression.tables import tables
from offpath.studies.files import write_text
from offpath.studies.page import write_page
from offpath.studies.plots import to_svg


def write_report(result: StudyResult, folder: Path) -> None:
    """Write `report.html` and a file for each plot into `folder`. Raises `RunError` when they cannot be written."""
    plots = {name: to_svg(figure, salt=name) for name, figure in figures(result).items()}
    for name, plot in plots.items():
        write_text(folder / f"{name}.svg", plot)
    write_page(
        folder / "report.html",
        "compression/study.html.jinja",
        machine=result.machine or asdict(this_machine()),
        result=result,
        tables=tables(result),
        figures=plots,
    )
