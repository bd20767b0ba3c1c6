"""Fixtures: every backend, every thread count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offpath import kernels
from offpath.kernels import Backend, cpu


@pytest.fixture(scope="session", autouse=True)
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cost table for all tests and the processes they start, and none left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPATH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


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
    expected = set() if chosen.name == "reference" else {chosen.name.removeprefix("cpu:")}
    assert ran == expected, f"asked for {chosen.name}, but {sorted(ran) or 'no native variant'} ran"
