"""Times that other work on the machine has lengthened: seen, left out, and not kept for good."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offpath.kernels import measured, undisturbed


class Clock:
    """The system's clocks, moved by the calls that are timed: each takes its seconds and waits for its core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.waited = 0.0
        monkeypatch.setattr(undisturbed.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(undisturbed, "waited_seconds", lambda: self.waited)

    def taking(self, times: Iterator[tuple[float, float]]) -> Callable[[], None]:
        def call() -> None:
            seconds, waits = next(times)
            self.now += seconds
            self.waited += waits

        return call


def test_disturbed_times_count_only_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    warm_up = (9.0, 0.0)
    calls = {
        "alone": clock.taking(iter([warm_up, (0.3, 0.0), (0.2, 0.0), (0.4, 0.0)])),
        # The shortest time is not believed: what waited may have been cut out of it as well.
        "once": clock.taking(iter([warm_up, (0.1, 0.05), (0.5, 0.0), (0.6, 0.05)])),
        "at last": clock.taking(iter([warm_up, *[(0.9, 0.8)] * 4, (0.7, 0.0)])),
        "never": clock.taking(iter([warm_up, *[(0.9, 0.8)] * 5, (0.8, 0.7), *[(0.9, 0.8)] * 3])),
    }
    found = undisturbed.fastest(calls, rounds=3)
    assert found == pytest.approx({"alone": 0.2, "once": 0.5, "at last": 0.7, "never": 0.8})


def test_waking_up_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call = clock.taking(iter([(1.0, 0.0), (1e-5, 1e-4), (2e-5, 0.0)]))
    assert undisturbed.fastest({"small": call}, rounds=2) == pytest.approx({"small": 1e-5})


def test_what_is_called_before_a_call_is_neither_timed_nor_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call = clock.taking(iter([(9.0, 0.0), (0.3, 0.0), (0.2, 0.0)]))
    before = clock.taking(iter([(0.1, 0.0), (5.0, 4.0)]))
    assert undisturbed.fastest({"timed": call}, rounds=2, before={"timed": before}) == pytest.approx({"timed": 0.2})


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system does not count for how long threads wait for a core"
)
def test_another_process_on_the_core_is_seen() -> None:
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    busy = f"import os; os.sched_setaffinity(0, {core})\nprint(flush=True)\nwhile True: pass"

    def work() -> None:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass

    other = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    try:
        os.sched_setaffinity(0, core)
        assert other.stdout is not None and other.stdout.readline()
        assert undisturbed.watched(work) == (None, False)
    finally:
        os.sched_setaffinity(0, cores)
        other.kill()
        other.communicate()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bool], object]:
    """Asks for a number that is measured as `value` now, on a machine that is busy or not."""
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    measured._warn_of_other_work.cache_clear()

    def asked(value: str, busy: bool) -> object:
        monkeypatch.setattr(measured, "watched", lambda work: (work(), not busy))
        monkeypatch.setattr(measured, "cores_are_free", lambda: not busy)
        return measured.measured_once("costs", "cpu", torch.float32, [], lambda found: True, lambda: value)

    return asked


def test_what_was_measured_on_a_busy_machine_is_measured_again_when_it_is_free(
    ask: Callable[[str, bool], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask("first", True) == "first" and "while other work had the cores" in caplog.text
    assert ask("second", False) == "first"  # it is too early to try again
    (path,) = tmp_path.glob("*.json")
    later = path.stat().st_mtime - measured.RETRY_SECONDS - 1
    os.utime(path, (later, later))
    assert ask("third", True) == "first"
    path.unlink()
    assert ask("first", True) == "first" and caplog.text.count("while other work had the cores") == 1, "said again"
    os.utime(path, (later, later))
    assert ask("fourth", False) == ask("fifth", True) == "fourth"
    os.utime(path, (later, later))
    assert ask("sixth", False) == "fourth"


def test_a_process_that_never_lets_go_of_the_cache_is_not_waited_for(
    ask: Callable[[str, bool], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "LOCK_SECONDS", 0.2)
    assert ask("first", False) == "first"
    (path,) = tmp_path.glob("*.json")
    with path.with_suffix(".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert ask("second", False) == "first"
        path.unlink()
        assert ask("third", False) == ask("fourth", False) == "third"
