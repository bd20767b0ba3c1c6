"""The `offpath` command.

A package of its own beside `offpath`, because importing anything below `offpath` imports torch first (seconds), and
`offpath --help` should be instant.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line; without the `cli` extra, say how to get it."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if any(argument == "" or (argument.startswith("--") and argument.endswith("=")) for argument in sys.argv[1:]):
        # As a path it would be the current folder.
        sys.exit("error: expected arguments that say something, got an empty one; is a variable of the shell unset?")
    try:
        from offpath_cli import compression, study  # noqa: F401 (late: the extra may not be installed; they add commands)
        from offpath_cli.commands import app

        app()
    except ModuleNotFoundError as error:
        sys.exit(f"error: the offpath command needs {error.name}; install it with: pip install 'offpath[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C while torch is still being imported: nothing has begun
