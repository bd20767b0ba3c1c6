"""What is taught runs: every docstring example, and every Python block of the README."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import offpath
from offpath.studies.compression.result import StudyResult as MiniLMResult
from offpath.studies.compression.tables import docs_block as minilm_block
from offpath.studies.crossover import CrossoverResult
from offpath.studies.crossover.tables import crossover_block
from offpath.studies.race import RaceResult
from offpath.studies.tables import demo_block
from offpath.studies.topology import StudyResult
from offpath.studies.topology.tables import docs_block

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(offpath.__path__, "offpath.") if not m.name.endswith("_native"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_of_the_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    namespace: dict = {}
    for block in blocks:  # one page is one session: later blocks may use what earlier ones defined
        exec(compile(block, str(page), "exec"), namespace)
    assert blocks or page.name != "README.md"


def test_numbers_of_the_readme_are_those_of_the_committed_demo() -> None:
    result = RaceResult.from_json(json.loads((ROOT / "docs" / "demo" / "race.json").read_text()))
    assert demo_block(result) in (ROOT / "README.md").read_text()


def test_break_evens_of_the_readme_are_those_of_the_committed_crossover() -> None:
    """Nothing stands there as long as no run is committed."""
    made = ROOT / "docs" / "crossover" / "crossover.json"
    block = crossover_block(CrossoverResult.from_json(json.loads(made.read_text()))) + "\n" if made.exists() else ""
    assert f"<!-- crossover -->\n{block}<!-- /crossover -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "from_json", "to_block"),
    [
        ("topology", StudyResult.from_json, docs_block),
        ("minilm", MiniLMResult.from_json, minilm_block),
    ],
)
def test_tables_of_a_study_are_those_of_the_committed_result(
    name: str, from_json: Callable[[dict], Any], to_block: Callable[[Any], str]
) -> None:
    """Nothing stands there as long as no result is committed."""
    folder = ROOT / "docs" / "studies"
    page, made = (folder / f"{name}.md").read_text(), folder / f"{name}.json"
    block = to_block(from_json(json.loads(made.read_text()))) if made.exists() else ""
    assert f"<!-- study -->\n{block}\n<!-- /study -->" in page


def test_public_functions_have_an_example() -> None:
    recipes = offpath.Static, offpath.SET, offpath.RigL, offpath.MEST, offpath.GMP, offpath.topology.Topology
    public = offpath.sparsify, offpath.densify, offpath.fuse, offpath.SparseLinear, offpath.Pattern, offpath.nn.rewire
    nn = offpath.nn
    activations = nn.TopK, nn.BatchTopK, nn.JumpReLU, nn.KWinners, nn.KWinners2d, nn.update_boost_strength
    readers = nn.SparseInputLinear, nn.SparseInputLinear.from_linear, nn.ProductKeyMemory
    for function in (*public, offpath.prune, offpath.compress, *recipes, *activations, *readers):
        assert ">>>" in (function.__doc__ or ""), function
