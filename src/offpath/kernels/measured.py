"""Numbers that are measured once on a machine and kept for later processes.

They lie in the user's cache directory (`OFFPATH_CACHE_DIR`, else `$XDG_CACHE_HOME/offpath`, else `~/.cache/offpath`)
under a fingerprint of processor, cores, instruction set, versions and what float32 may be rounded to. A process that
finds another one measuring waits for its numbers, as two that measured at once would disturb each other; but not for
ever, as the other may be stopped, or wait on a GPU for what this one has yet to send. What was measured while other
work had the cores serves until a later process finds them free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from offpath.kernels import cpu
from offpath.kernels.precision import float32_precision
from offpath.kernels.undisturbed import cores_are_free, watched

_log = logging.getLogger("offpath")
# On a machine that is busy for hours, not every process should try again.
RETRY_SECONDS = 600
# Several times what measuring takes.
LOCK_SECONDS, LOOK_SECONDS = 60.0, 0.05


def cache_folder() -> Path:
    """Where they lie; raises `OSError` for a user without a home directory, where no other one is chosen."""
    if chosen := os.environ.get("OFFPATH_CACHE_DIR"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "offpath"
    try:
        return Path.home() / ".cache" / "offpath"
    except RuntimeError as error:
        raise FileNotFoundError("no home directory for this user; set OFFPATH_CACHE_DIR to a folder") from error


def processor() -> str:
    """The processor as the system tells it; the numbers tell apart generations that a cloud calls by one name."""
    cpuinfo = Path("/proc/cpuinfo")
    return processor_of(cpuinfo.read_text() if cpuinfo.exists() else "")


def processor_of(cpuinfo: str) -> str:
    """The first processor that a text in the form of /proc/cpuinfo describes; those of Arm have numbers and no name."""
    facts = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        key, _, fact = line.partition(":")
        facts[key.strip()] = fact.strip()
    name = facts.get("model name") or platform.processor() or platform.machine() or "unknown"
    if "cpu family" in facts:
        return f"{name} (family {facts['cpu family']}, model {facts['model']})"
    if "CPU part" in facts:
        return f"{name} (implementer {facts['CPU implementer']}, part {facts['CPU part']})"
    return name


def measured_once(
    name: str,
    backend: str,
    dtype: torch.dtype,
    facts: list[object],
    is_complete: Callable[[Any], bool],
    measure: Callable[[], Any],
) -> Any:
    """What `measure()` gives (something that JSON holds): from the cache where it is complete, or measured now.

    `facts` are all that it depends on besides the machine, the `backend` of that name and `dtype`. A cache that cannot
    be read or written costs the measurement in every process, and a warning.
    """
    try:
        path = cache_folder() / f"{name}-{_fingerprint(backend, dtype, facts)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            kept = _read(path)
            if kept is None or not _holds(is_complete, kept["found"]) or _can_be_bettered(path, kept):
                found, undisturbed = watched(lambda: _made_on_cpu(measure))
                kept = {"found": found, "undisturbed": undisturbed}
                _write(path, kept)
                if not undisturbed:
                    _warn_of_other_work()
        return kept["found"]
    except OSError as error:
        _log.warning("offpath measures its kernels in every process: cannot use its cache (%s)", error)
        return _made_on_cpu(measure)


@cache
def _warn_of_other_work() -> None:
    """Once in a process: of convolutions, there is a measurement for each size of images."""
    _log.warning(
        "offpath measured its kernels while other work had the cores, so that its choices may be slow; "
        "a process that starts in %d minutes or later, and finds them free, measures again",
        RETRY_SECONDS // 60,
    )


def _can_be_bettered(path: Path, kept: dict[str, Any]) -> bool:
    return not kept["undisturbed"] and time.time() - path.stat().st_mtime > RETRY_SECONDS and cores_are_free()


def _holds(is_complete: Callable[[Any], bool], found: Any) -> bool:
    try:
        return is_complete(found)
    except (AttributeError, KeyError, TypeError, ValueError):  # another shape than it looks for
        return False


def _made_on_cpu(measure: Callable[[], Any]) -> Any:
    """What `measure()` gives where tensors are made on the CPU, unless it says otherwise.

    Only where the user's default is another device, as torch then intercepts every call, and takes time for it.
    """
    if torch.get_default_device().type == "cpu":
        return measure()
    with torch.device("cpu"):
        return measure()


def _fingerprint(backend: str, dtype: torch.dtype, facts: list[object]) -> str:
    built = Path(cpu.native_file()).stat()
    precision = float32_precision("cpu") if dtype is torch.float32 else ""
    machine = [processor(), os.cpu_count(), backend, str(dtype), precision, torch.__version__, version("offpath")]
    return hashlib.sha256(json.dumps([*machine, built.st_size, built.st_mtime_ns, *facts]).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        end = time.monotonic() + LOCK_SECONDS
        while not _lock(file) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if isinstance(kept, dict) and set(kept) == {"found", "undisturbed"} else None


def _write(path: Path, found: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(found))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
