"""A variant exports its table and nothing else, or an AVX-512 copy of a shared function could end up in the
baseline path. Looked at in an unoptimised build: the optimiser would inline the evidence away."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
ROWS = [row.split(maxsplit=2) for row in (CSRC / "isa_flags.txt").read_text().splitlines()]


def _tool(name: str, cross: str, processor: str) -> str:
    own = processor == platform.machine()
    tool = name if own else f"{processor}-linux-gnu-{cross}"
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}, {'which built the package' if own else 'which compiles for another processor'}")
    return tool


def _exported(source: Path, row: list[str], folder: Path) -> list[str]:
    processor, isa, flags_of_isa = row
    built = folder / f"{isa}.o"
    flags = ["-std=c++20", "-O0", "-fno-exceptions", "-fno-rtti", *flags_of_isa.split(), f"-DOFFPATH_ISA={isa}"]
    subprocess.run([_tool("c++", "g++", processor), *flags, f"-I{CSRC}", "-c", source, "-o", built], check=True)
    command = [_tool("nm", "nm", processor), "--extern-only", "--defined-only", built]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in out.stdout.splitlines()]


def _source(isa: str) -> Path:
    own = CSRC / f"variant_{isa}.cpp"
    return own if own.exists() else CSRC / "variant.cpp"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_a_variant_exports_only_its_table(row: list[str], tmp_path: Path) -> None:
    assert _exported(_source(row[1]), row, tmp_path) == [f"offpath_table_{row[1]}"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_the_gate_sees_a_weak_symbol(row: list[str], tmp_path: Path) -> None:
    dirty = tmp_path / "dirty.cpp"
    dirty.write_text("#include <vector>\nvoid grow(std::vector<int> &v) { v.push_back(1); }\n")
    assert len(_exported(dirty, row, tmp_path)) > 1
