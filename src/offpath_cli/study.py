"""`offpath study`: the studies that take an hour and can be stopped."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from offpath_cli.asked import absolute
from offpath_cli.commands import INTERRUPTED, app, reports_errors

studies = typer.Typer(help="Studies on real data with seeds and spread; they can be stopped and gone on with.")
app.add_typer(studies, name="study", no_args_is_help=True)

Data = Annotated[
    list[str] | None,
    typer.Option(help="Where a data set is, as NAME=PATH: cifar10, fashion-mnist, tinyshakespeare; repeatable."),
]
Out = Annotated[Path | None, typer.Option(help="Where to write and to go on (default: runs/study-topology[-quick]).")]
Pairs = Annotated[
    Path | None, typer.Option(help="WordNet's data.noun or its folder (default: OFFPATH_DATA and known places).")
]
MiniLMOut = Annotated[
    Path | None, typer.Option(help="Where to write and to go on (default: runs/study-minilm[-quick]).")
]
MiniLMQuick = Annotated[bool, typer.Option("--quick", help="A small version on a text that is always there.")]
Jobs = Annotated[int | None, typer.Option(help="Processes that train, one thread each (default: one for each core).")]
Quick = Annotated[bool, typer.Option("--quick", help="A tiny version on data that is always there: under a minute.")]


@studies.callback()
def study() -> None:
    """Studies on real data with seeds and spread; they can be stopped and gone on with."""


@studies.command()
@reports_errors
def topology(data: Data = None, out: Out = None, jobs: Jobs = None, quick: Quick = False) -> None:
    """Static, SET, RigL and GMP beside dense nets, on images and a text: tables, topology.json, report.html."""
    import os

    from offpath.studies.topology import study as run_study
    from offpath.studies.topology.config import FULL, QUICK
    from offpath.studies.topology.report import write_report
    from offpath.studies.topology.tables import tables
    from offpath_cli.study_display import StudyDisplay, print_tables

    out = out or Path("runs") / f"study-topology{'-quick' if quick else ''}"
    config = QUICK if quick else FULL
    with StudyDisplay() as display:
        result = run_study(config, out, _places(data or []), os.cpu_count() or 1 if jobs is None else jobs, display)
    write_report(result, out)
    print_tables(tables(result), display)
    display.say(f"plots: {out / 'report.html'}   numbers: {out / 'topology.json'}")
    if not result.complete:
        display.say(f"stopped; the same command goes on with it in {shlex.quote(str(out))}")
        raise typer.Exit(INTERRUPTED)


@studies.command()
@reports_errors
def minilm(data: Pairs = None, out: MiniLMOut = None, quick: MiniLMQuick = False) -> None:
    """MiniLM pruned in one shot and with a short training: embeddings, files, speed; minilm.json, report.html."""
    from offpath.studies.compression.config import FULL, QUICK
    from offpath.studies.compression.report import write_report
    from offpath.studies.compression.study import RESULT, study as run_study
    from offpath.studies.compression.tables import tables
    from offpath_cli.study_display import WatchDisplay, print_tables

    out = out or Path("runs") / f"study-minilm{'-quick' if quick else ''}"
    with WatchDisplay() as display:
        result = run_study(QUICK if quick else FULL, out, data, display.watch)
    write_report(result, out)
    print_tables(tables(result), display)
    display.say(f"plots: {out / 'report.html'}   numbers: {out / RESULT}")
    if not result.complete:
        display.say(f"stopped; the same command goes on with it in {shlex.quote(str(out))}")
        raise typer.Exit(INTERRUPTED)


def _places(texts: list[str]) -> dict[str, str]:
    from offpath.studies import RunError

    places = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise RunError(f"expected --data NAME=PATH, such as cifar10=cifar-10-python.tar.gz, got {text!r}")
        places[name] = absolute(path)
    return places
