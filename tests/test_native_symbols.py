"""A variant exports its table and nothing else, or an AVX-512 copy of a shared function could end up in the
baseline path. Looked at in an unoptimised build: the optimiser would inline the evidence away."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = dict(row.split(maxsplit=1) for row in (CSRC / "isa_flags.txt").read_text().splitlines())
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or shutil.which("nm") is None, reason="needs the C++ compiler (c++) and nm that built the package"
)


def _exported(source: Path, isa: str, folder: Path) -> list[str]:
    built = folder / f"{isa}.o"
    flags = ["-std=c++20", "-O0", "-fno-exceptions", "-fno-rtti", *FLAGS[isa].split(), f"-DOFFPATH_ISA={isa}"]
    subprocess.run([str(COMPILER), *flags, f"-I{CSRC}", "-c", source, "-o", built], check=True)
    out = subprocess.run(["nm", "--extern-only", "--defined-only", built], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in out.stdout.splitlines()]


@pytest.mark.parametrize("isa", FLAGS)
def test_a_variant_exports_only_its_table(isa: str, tmp_path: Path) -> None:
    assert _exported(CSRC / "variant.cpp", isa, tmp_path) == [f"offpath_table_{isa}"]


def test_the_gate_sees_a_weak_symbol(tmp_path: Path) -> None:
    dirty = tmp_path / "dirty.cpp"
    dirty.write_text("#include <vector>\nvoid grow(std::vector<int> &v) { v.push_back(1); }\n")
    assert len(_exported(dirty, "avx2", tmp_path)) > 1
