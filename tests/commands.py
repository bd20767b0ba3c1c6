"""The `offpath` command in this process: for what needs none of its own, which would first import torch for seconds."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from offpath_cli import compression, study  # noqa: F401 (they add their commands)
from offpath_cli.commands import app


def run_offpath(*arguments: object, columns: int = 120) -> Result:
    """Its exit code and what it prints; `main` itself is what test_cli.py starts."""
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
