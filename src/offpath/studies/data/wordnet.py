"""Parsing the nouns of WordNet."""

from __future__ import annotations

import re

from offpath.studies.data.errors import DataError

EXAMPLES = re.compile(r';?\s*".*')


def parse_nouns(text: str, source: str) -> list[tuple[str, str]]:
    """(words of a noun, its definition) for every line of a `data.noun` that defines one; examples are left out.

    Raises `DataError`, naming `source`, for a line of another form. Source: the manual page wndb(5WN).

    >>> line = '00005930 03 n 02 dwarf 0 gnome 0 001 @ 00004475 n 0000 | an atypically small plant; "a dwarf"  '
    >>> parse_nouns(line, "here")
    [('dwarf, gnome', 'an atypically small plant')]
    """
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(" "):  # the licence
            continue
        fields, separator, gloss = line.partition(" | ")
        try:
            _, _, kind, count, *rest = fields.split(" ")
            words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
            if kind != "n" or not separator or not words:
                raise ValueError(f"{line[:40]!r}")
        except ValueError as error:
            next_step = "replace it with an intact copy"
            raise DataError(f"line {number} of {source} to define a noun", str(error), next_step) from error
        if definition := EXAMPLES.sub("", gloss).strip(" ;"):
            pairs.append((", ".join(words), definition))
    return pairs
