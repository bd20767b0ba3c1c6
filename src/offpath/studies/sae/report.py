"""`report.html` of a run and of a race of autoencoders: self-contained pages."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from offpath.cost import this_machine
from offpath.studies.config import RunError
from offpath.studies.folder import RunFolder
from offpath.studies.page import write_page
from offpath.studies.plots import to_svg
from offpath.studies.sae.config import SaeConfig
from offpath.studies.sae.plots import race_figures, train_figures
from offpath.studies.sae.race import SaeRaceResult
from offpath.studies.sae.tables import race_rows


def write_train_report(folder: Path) -> None:
    """Write `report.html` into the run's `folder`. Raises `RunError` when no epoch has been finished there."""
    run = RunFolder(folder)
    records = run.metrics()
    if not records:
        raise RunError(f"expected a finished epoch in {run.metrics_file}, found none; go on with the run by --resume")
    write_page(
        folder / "report.html",
        "sae/train_report.html.jinja",
        machine=asdict(this_machine()),
        config=run.config_values(),
        data_name=SaeConfig.from_json(run.config_values()).data_name,
        last=records[-1],
        figures={title: to_svg(figure, salt=title) for title, figure in train_figures(records).items()},
    )


def write_race_report(result: SaeRaceResult, path: Path) -> None:
    """Write the page for `result` to `path`. Raises `RunError` when it cannot be written."""
    write_page(
        path,
        "sae/race_report.html.jinja",
        machine=result.machine,
        result=result,
        data_name=SaeConfig.from_json(result.config).data_name,
        header=("", "dense", "sparse", "dense / sparse"),
        rows=race_rows(result),
        figures={title: to_svg(figure, salt=title) for title, figure in race_figures(result).items()},
    )
