"""Fixtures: every backend, every thread count."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import waiting_threads  # noqa: F401 (before torch)

# isort: split
import pytest
import torch
from hypothesis import settings

from data_files import tiny_files
from offpath import kernels
from offpath.kernels import Backend, calibration, cpu
from offpath.studies.data import DATASETS, IdxSpec
from offpath.studies.data.locate import DATA_DIR_VARIABLE, cache_dir

# eai-sparsify chooses its decoder when it is imported: Triton wherever that is installed, even without a GPU.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

# A busy machine is no mistake: no test says how long anything may take.
settings.register_profile("offpath", deadline=None)
settings.load_profile("offpath")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what runs the same code as another test. Long ones first."""
    twice = {item for item in items if hasattr(item, "callspec") and _runs_twice(item.path.stem, item.callspec.params)}
    config.hook.pytest_deselected(items=list(twice))
    kept = [item for item in items if item not in twice]
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("long") is None)


def _runs_twice(module: str, params: dict[str, object]) -> bool:
    if params.get("backend") == "reference":  # by far the slowest one, and it knows no threads
        return params.get("threads") == 2
    # Tiles multiply bfloat16 and int8; beside that, the table has the kernels of avx512bf16.
    of_floats = params.get("dtype") in (torch.float32, torch.float64) and module != "test_int8"
    return params.get("backend") == "cpu:avx512amx" and of_floats


@pytest.fixture(scope="session", autouse=True)
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cost table for all tests, their workers and the processes they start, and none left in the user's cache.

    Measured in one round: no test depends on how well times are known.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers' own folders lie in it
    with pytest.MonkeyPatch.context() as patch:
        for rounds in ("SMALL_ROUNDS", "LARGE_ROUNDS"):
            patch.setattr(calibration, rounds, 1)
        patch.setenv("OFFPATH_CACHE_DIR", str(folder / "cache"))
        yield


@pytest.fixture(autouse=True)
def measured_for_good(measured_once: None) -> None:
    """What was measured on busy cores stays: measured again, the kernels would be others, and so the last bits."""
    for kept in (Path(os.environ["OFFPATH_CACHE_DIR"])).glob("*.json"):
        kept.touch()


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} thread" + "s" * (n > 1))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(kernels.backends()))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend of this machine; the test fails if a native variant was asked for and another one ran."""
    chosen = kernels.backends()[request.param]
    calls_before = {isa: cpu.calls(isa) for isa in cpu.isas()}
    with kernels.forced(chosen):
        yield chosen
    ran = {isa for isa in cpu.isas() if cpu.calls(isa) > calls_before[isa]}
    expected = {chosen.name.removeprefix("cpu:")} if chosen.native else set()
    assert ran == expected, f"asked for {chosen.name}, but {sorted(ran) or 'no native variant'} ran"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> IdxSpec:
    """A data set of 12 + 6 images as a row of the table, searched for only below `tmp_path`."""
    spec = IdxSpec(
        name="tiny",
        classes=3,
        home_url="http://127.0.0.1:9/",
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in tiny_files().items()},
        system_dirs=(tmp_path / "system",),
        package_commands=("install tiny-package",),
    )
    monkeypatch.setitem(DATASETS, "tiny", spec)
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert cache_dir().is_relative_to(tmp_path)
    return spec
