"""The house: which room may import which, and the few things that may stand in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from children import environment, outcomes_under
from offpath.kernels import _native

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "offpath"

# Room: the rooms that it may import.
ROOMS = {
    "pattern": set(),
    "kernels": set(),
    "ops": {"pattern", "kernels"},
    "nn": {"pattern", "ops"},
    "topology": {"pattern", "nn"},
    "trainers": {"pattern", "nn", "topology"},
    "swapins": {"kernels", "ops", "nn"},
    "cost": {"pattern", "kernels", "ops"},
    "convert": {"pattern", "nn", "topology", "cost"},
    "storage": {"pattern", "nn", "convert"},
    "studies": {"pattern", "kernels", "ops", "nn", "topology", "cost", "convert", "storage"},
    "cli": {"studies", "convert", "cost"},
}
# All others stand on torch and numpy alone, one of them also on the library of its file format.
LIGHT_ROOMS = set(ROOMS) - {"trainers", "swapins", "studies", "cli"}
THIRD_PARTY = {"torch", "numpy"}
ALSO = {"storage": {"safetensors"}}
# The kernels written in Triton; whoever imports one of these does so late.
ALSO_BELOW = {"kernels/gpu/": {"triton"}}
# What may be imported late, because few need it and it is heavy.
LATE = {"storage/hugging_face.py": {"transformers"}}
# Thing: the only files that may import it.
ONLY_IN = {
    "offpath.kernels._native": {
        "kernels/cpu.py",
        "kernels/plans.py",
        *(f"kernels/variant{of}.py" for of in ("", "_convolution", "_gradients", "_int8", "_rows", "_sparse_rows")),
    },
    "torch.library": {"ops/library.py"},
}
BINDINGS = {"module.h", "operand.h", "operand.cpp"} | {
    f"module{of}.cpp" for of in ("", "_convolution", "_int8", "_products", "_rows", "_selection")
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Full names of what a file imports, and whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names]
    return found


def _violations(path: Path, imports: list[tuple[str, bool]]) -> list[str]:
    room, place = _room(path), path.relative_to(PACKAGE).as_posix()
    third_party = THIRD_PARTY | ALSO.get(room, set())
    third_party |= set().union(*(names for below, names in ALSO_BELOW.items() if place.startswith(below)))
    problems = []
    for name, inside_function in imports:
        top, *rest = name.split(".")
        if inside_function and top in LATE.get(place, set()):
            continue
        if top == "offpath" and room != "__init__":
            target = rest[0] if rest else "offpath"
            if target != room and target not in ROOMS[room]:
                problems.append(f"{place} imports {name}: {room} may import {sorted(ROOMS[room])}")
        elif room in LIGHT_ROOMS and top not in third_party and top not in sys.stdlib_module_names:
            problems.append(f"{place} imports {name}: not torch, numpy or the standard library")
        if inside_function and room in LIGHT_ROOMS:
            problems.append(f"{place} imports {name} inside a function")
        for thing, places in ONLY_IN.items():
            if (name == thing or name.startswith(thing + ".")) and place not in places:
                problems.append(f"{place} imports {name}, which only {sorted(places)} may")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    assert _room(path) == "__init__" or _room(path) in ROOMS, f"{path} belongs to no room"
    assert _violations(path, _imports(path)) == []


@pytest.mark.parametrize(
    ("place", "name", "inside_function"),
    [
        ("pattern/x.py", "offpath.kernels", False),
        ("kernels/x.py", "offpath.pattern.Pattern", False),
        ("kernels/x.py", "offpath.kernels._native", False),
        ("nn/x.py", "offpath.kernels", False),
        ("cost/x.py", "offpath.nn.SparseLinear", False),
        ("nn/x.py", "rich.table", False),
        ("kernels/x.py", "triton", False),
        ("nn/x.py", "torch.library", False),
        ("ops/x.py", "math", True),
        ("topology/x.py", "lightning.pytorch", False),
        ("trainers/x.py", "offpath.convert", False),
        ("swapins/x.py", "offpath.topology", False),
        ("storage/x.py", "transformers", True),
        ("storage/hugging_face.py", "transformers", False),
        ("storage/x.py", "offpath.ops", False),
        ("nn/x.py", "safetensors", False),
        ("cli.py", "offpath.nn", True),
    ],
)
def test_the_rules_can_fail(place: str, name: str, inside_function: bool) -> None:
    assert _violations(PACKAGE / place, [(name, inside_function)])


def test_intrinsics_and_nanobind_stand_in_their_own_files() -> None:
    for source in (ROOT / "csrc").iterdir():
        text = source.read_text()
        assert source.name.startswith("simd") or not re.search(r"immintrin\.h|\b_mm\d*_", text), source
        assert source.name in BINDINGS or "nanobind" not in text, source
        assert "torch/" not in text, source
        assert source.name in BINDINGS or "Python.h" not in text, source


def test_files_stay_short_enough_to_read() -> None:
    sources = [*FILES, *(ROOT / "csrc").iterdir()]
    assert {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > 300} == {}


def test_the_stub_names_what_the_native_module_has() -> None:
    stub = (PACKAGE / "kernels" / "_native.pyi").read_text()
    declared = set(re.findall(r"^(?:def |class )?(\w+)(?:\(|:| = )", stub, re.M))
    assert declared == {name for name in dir(_native) if not name.startswith("_")}


def test_every_environment_variable_is_in_the_readme() -> None:
    used = {v for p in FILES for v in re.findall(r"OFFPATH_[A-Z_]+", p.read_text())}
    readme = (ROOT / "README.md").read_text()
    assert {v for v in used if v not in readme} == set()


def _run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout


def test_plain_import_is_light() -> None:
    code = "import sys, torch; before = set(sys.modules); import offpath; print(*set(sys.modules) - before)"
    modules = _run(code).split()
    loaded = {name.split(".")[0] for name in modules}
    assert "offpath" in loaded
    heavy = {
        "lightning",
        "transformers",
        "accelerate",
        "sparsify",
        "sae_lens",
        "transformer_lens",
        "datasets",
        "wandb",
        "matplotlib",
        "triton",
        "typer",
        "click",
        "rich",
        "sklearn",
        "pooch",
        "jinja2",
        "filelock",
    }
    assert loaded & heavy == set()
    assert "torch._dynamo" not in modules, "importing the compiler takes a second"


def test_importing_does_not_start_cuda() -> None:
    assert _run("import offpath, torch; print(torch.cuda.is_initialized())").strip() == "False"


def test_one_openmp_runtime_in_the_process() -> None:
    code = (
        "import torch, offpath; from offpath.kernels import cpu\n"
        "torch.set_num_threads(2); layer = offpath.SparseLinear(512, 512)\n"
        "with offpath.ops.forced_methods(forward='bucketed', dx='bucketed', dvalues='tiled'):\n"
        "  layer(torch.randn(256, 512, requires_grad=True)).sum().backward()\n"
        "torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "print(cpu.pool_library()); print(open('/proc/self/maps').read())"
    )
    pool, maps = _run(code).split("\n", 1)
    assert _openmp_runtimes(maps) == {Path(pool).resolve()}


def _openmp_runtimes(maps: str) -> set[Path]:
    """The files of them that a process has mapped, by its /proc/self/maps."""
    found = (line.split()[-1] for line in maps.splitlines() if re.search(r"/lib(g|i)?omp[^/]*\.so", line))
    return {Path(path).resolve() for path in found}


def test_torchs_openmp_runtime_is_found_where_it_is_not_visible_everywhere() -> None:
    """As torch's wheels for AArch64 have it."""
    code = (
        "import ctypes; load = ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, mode=0, **how: load(name, mode & ~ctypes.RTLD_GLOBAL, **how)\n"
        "import torch; assert not hasattr(load(None), 'GOMP_parallel'); ctypes.CDLL = load\n"
        "from offpath.kernels import cpu; print(cpu.pool_library()); print(open('/proc/self/maps').read())"
    )
    pool, maps = _run(code).split("\n", 1)
    assert _openmp_runtimes(maps) == {Path(pool).resolve()}


def test_thread_count_of_torch_is_honoured() -> None:
    code = (
        "torch.set_num_threads(1)\n"
        "layer, x = offpath.SparseLinear(512, 512), torch.ones(256, 512)\n"
        "torch.set_num_threads(int(os.environ['COUNT']))\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "with offpath.ops.forced_methods(forward='bucketed'): layer(x)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    for count, outcome in enumerate(outcomes_under([{"COUNT": str(count)} for count in (1, 2, 3)], code), start=1):
        assert outcome == (0, f"{count - 1}\n", "")
