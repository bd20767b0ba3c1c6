"""`report.html` of a race: one self-contained page with the table, the plots and where they come from."""

from __future__ import annotations

from pathlib import Path

from offpath.studies.page import write_page
from offpath.studies.plots import report_figures, to_svg
from offpath.studies.race import RaceResult
from offpath.studies.tables import race_rows


def write_report(result: RaceResult, path: Path) -> None:
    """Write the page for `result` to `path`. Raises `RunError` when it cannot be written."""
    write_page(
        path,
        "report.html.jinja",
        machine=result.machine,
        result=result,
        header=("", "dense", "sparse", "dense / sparse"),
        rows=race_rows(result),
        figures={title: to_svg(figure, salt=title) for title, figure in report_figures(result).items()},
    )
