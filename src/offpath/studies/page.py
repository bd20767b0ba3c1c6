"""Self-contained HTML pages: every report extends `page.html.jinja`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from offpath.studies.files import write_text


def write_page(path: Path, template: str, machine: dict[str, Any], **values: Any) -> None:
    """Fill `template`, a file in this room, and write the page to `path`. Raises `RunError` when it cannot be written.

    Every page ends with the `machine` that its numbers come from.
    """
    loader = FunctionLoader(lambda name: files("offpath.studies").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    shown = machine | {"isas": ", ".join(name for name, runs_here in machine["isas"].items() if runs_here)}
    write_text(path, environment.get_template(template).render(machine=shown, **values))
