"""Pairs of texts: found, recognised by their checksum, parsed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from offpath.studies.data import DataError, DataNotFoundError, load_pairs
from offpath.studies.data.locate import DATA_DIR_VARIABLE
from offpath.studies.data.pairs import PAIRS, WORDNET
from offpath.studies.data.wordnet import parse_nouns

LINES = """  1 This software and database is being provided to you, the LICENSEE
00005930 03 n 02 dwarf 0 tiny_plant 1 001 @ 00004475 n 0000 | a plant that is atypically small
00006269 03 n 01 life 0 002 @ 00004258 n 0000 ~ 07993776 n 0000 | living things; all of them; "the oceans teem"
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A WordNet of two nouns, that a package would put into `tmp_path/system`."""
    known = {hashlib.sha256(LINES.encode()).hexdigest(): "WordNet 0.1"}
    monkeypatch.setitem(PAIRS, "wordnet", replace(WORDNET, sha256=known, system_dirs=(tmp_path / "system",)))
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


def _write(folder: Path, text: str = LINES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.noun").write_text(text)
    return folder


@pytest.mark.usefixtures("tiny")
def test_words_and_definitions_from_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataNotFoundError, match="apt-get install wordnet-base"):
        load_pairs("wordnet")
    found = load_pairs("wordnet", _write(tmp_path / "named"))
    assert found.queries == ["dwarf, tiny plant", "life"]
    assert found.documents == ["a plant that is atypically small", "living things; all of them"]
    assert found.source == "WordNet 0.1, data.noun"
    assert load_pairs("wordnet", tmp_path / "named" / "data.noun") == found
    _write(tmp_path / "system")
    assert load_pairs("wordnet") == found
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path / "everything"))
    assert load_pairs("wordnet") == found  # nothing there
    _write(tmp_path / "everything" / "wordnet", LINES + "\n")
    with pytest.raises(DataError, match=r"to be of WordNet 0\.1; got SHA-256"):
        load_pairs("wordnet")  # an edited file there is not passed over


@pytest.mark.usefixtures("tiny")
def test_a_named_place_without_the_file_is_no_reason_to_look_elsewhere(tmp_path: Path) -> None:
    _write(tmp_path / "system")
    with pytest.raises(DataNotFoundError, match="none in"):
        load_pairs("wordnet", tmp_path / "nowhere")


@pytest.mark.parametrize("line", ["garbage", "00005930 03 v 01 run 0 000 | to go fast", "00005930 03 n zz x 0 | y"])
def test_a_line_of_another_form_is_named(line: str) -> None:
    with pytest.raises(DataError, match="line 4 of here to define a noun"):
        parse_nouns(LINES + line, "here")


def test_names_and_sentences_of_pythons_library() -> None:
    pairs = load_pairs("python-docs")
    assert len(pairs.queries) == len(pairs.documents) > 1000
    assert len(set(pairs.documents)) == len(pairs.documents) and all(pairs.queries) and pairs.source
    assert dict(zip(pairs.documents, pairs.queries, strict=True))[
        "Return the median (middle value) of numeric data."
    ] == ("statistics median")


def test_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(DataError, match="use 'wordnet'"):
        load_pairs("worndet")


def test_the_real_nouns_are_read_whole() -> None:
    try:
        pairs = load_pairs("wordnet")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    assert len(pairs.queries) == {"WordNet 3.0": 82115, "WordNet 3.1": 82192}[pairs.source.split(",")[0]]
    assert pairs.documents[pairs.queries.index("dwarf")] == "a plant or animal that is atypically small"
