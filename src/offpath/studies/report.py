"""`report.html`: one self-contained page with the table, the plots and where they come from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from offpath.studies.files import write_text
from offpath.studies.plots import report_figures, to_svg
from offpath.studies.race import RaceResult
from offpath.studies.tables import race_rows


def write_report(result: RaceResult, path: Path) -> None:
    """Write the page for `result` to `path`. Raises `RunError` when it cannot be written."""
    source = files("offpath.studies").joinpath("report.html.jinja").read_text()
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    html = page.render(
        result=result,
        header=("", "dense", "sparse", "dense / sparse"),
        rows=race_rows(result),
        figures={title: to_svg(figure, salt=title) for title, figure in report_figures(result).items()},
        machine=result.machine | {"isas": ", ".join(name for name, runs in result.machine["isas"].items() if runs)},
    )
    write_text(path, html)
