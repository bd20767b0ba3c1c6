"""Names of functions in Python's library and what is written about them: a text that is always there."""

from __future__ import annotations

import argparse
import ast
import inspect
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

LONGEST = 300


@cache
def read_docstrings() -> tuple[list[tuple[str, str]], str]:
    """(name as words, first sentence of the docstring) of the library's top-level modules, and where they are from.

    Files are parsed, not imported; what starts with an underscore and what was said before is left out.
    """
    folder = Path(argparse.__file__).parent
    pairs: dict[str, str] = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        for name, docstring in _documented(ast.parse(path.read_bytes()), path.stem):
            sentence = re.split(r"(?<=\.)\s|\n\s*\n", inspect.cleandoc(docstring))[0].replace("\n", " ").strip()
            words = re.sub(r"[._\s]+", " ", name)
            if " " in sentence and len(sentence) <= LONGEST and sentence not in pairs:
                pairs[sentence] = words
    source = f"docstrings of the library of Python {platform.python_version()}"
    return [(words, sentence) for sentence, words in pairs.items()], source


def _documented(tree: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            full = f"{name}.{node.name}"
            if docstring := ast.get_docstring(node):
                yield full, docstring
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, full)
