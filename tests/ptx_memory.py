"""Memory as the threads of a launch see it: what is outside of it, and who must not touch what before a barrier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from watched_memory import addresses_of

_NOBODY, _MANY = -1, -2


class Faults(AssertionError):
    """A launch that touches what it must not, or whose threads do not meet where they must."""


def expect(fine: bool | np.ndarray, fault: str) -> None:
    if not np.all(fine):
        raise Faults(fault)


class Threads:
    """Who takes part in one access, of each byte: its warp, its program, and the barriers that its program passed."""

    def __init__(self, warps: np.ndarray, programs: np.ndarray, passed: np.ndarray, size: int) -> None:
        self.warps, self.programs, self.passed = (np.repeat(one, size) for one in (warps, programs, passed))


class Accesses:
    """Which warps have read and written each byte, and after how many barriers.

    Within a program, what one warp writes another one may touch only behind a barrier, unless both write at once, the
    same (`put`); other programs, never.
    """

    def __init__(self, count: int) -> None:
        self.writing_warp, self.reading_warp, self.writing_program, self.reading_program = np.full(
            (4, count), _NOBODY, np.int64
        )
        self.written_after, self.read_after = np.zeros((2, count), np.int64)

    def read(self, places: np.ndarray, by: Threads) -> None:
        self._expect_written_before(places, by, "reads")
        again = (self.reading_program[places] == by.programs) & (self.read_after[places] == by.passed)
        self.reading_warp[places] = _joined(np.where(again, self.reading_warp[places], _NOBODY), by.warps)
        self.reading_program[places] = _joined(self.reading_program[places], by.programs)
        # Of several in this access, the last one was noted.
        self.reading_warp[places[self.reading_warp[places] != by.warps]] = _MANY
        self.reading_program[places[self.reading_program[places] != by.programs]] = _MANY
        self.read_after[places] = by.passed

    def write(self, places: np.ndarray, by: Threads) -> None:
        self._expect_written_before(places, by, "writes")
        reading = self.reading_program[places]
        expect((reading == _NOBODY) | (reading == by.programs), "a program writes what another one has read")
        warp = self.reading_warp[places]
        seen = (warp == _NOBODY) | (warp == by.warps) | (self.read_after[places] < by.passed)
        expect(seen, "a warp writes what another one reads, without a barrier between them")
        self.writing_warp[places], self.writing_program[places] = by.warps, by.programs
        expect(self.writing_program[places] == by.programs, "a program writes what another one has written")
        self.written_after[places] = by.passed

    def _expect_written_before(self, places: np.ndarray, by: Threads, does: str) -> None:
        program, warp = self.writing_program[places], self.writing_warp[places]
        mine = (program == _NOBODY) | (program == by.programs)
        expect(mine, f"a program {does} what another one has written")
        ready = (warp == _NOBODY) | (warp == by.warps) | (self.written_after[places] < by.passed)
        expect(ready, f"a warp {does} what another one writes, without a barrier between them")


def _joined(known: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.where((known == _NOBODY) | (known == one), one, _MANY)


class GlobalMemory:
    """The operands of a launch, at their own addresses."""

    def __init__(self, operands: Sequence[Tensor]) -> None:
        of_bytes = [addresses_of(one)[:, None] + np.arange(one.element_size(), dtype=np.uint64) for one in operands]
        self.inside = np.unique(np.concatenate([np.zeros(1, np.uint64), *(one.ravel() for one in of_bytes)]))
        self.inside = self.inside.astype(np.int64)
        self.first = int(self.inside[1]) & -16 if self.inside.size > 1 else 0
        self.bytes = _memory(self.first, int(self.inside[-1]) + 1 - self.first)
        self.accesses = Accesses(self.inside.size)

    def touch(self, addresses: np.ndarray, by: Threads, writes: bool) -> np.ndarray:
        """Where `bytes` holds each byte of an access, once nothing forbids it; `addresses` [threads, size]."""
        each = addresses.ravel()
        places = np.minimum(np.searchsorted(self.inside, each), self.inside.size - 1)
        does = "writes" if writes else "reads"
        expect((self.inside[places] == each) & (each != 0), f"a thread {does} outside of its operands")
        (self.accesses.write if writes else self.accesses.read)(places, by)
        expect(not writes or np.unique(places).size == places.size, "threads write to the same place")
        return addresses - self.first


class SharedMemory:
    """That of each program, one behind the other; poisoned, so that what nobody wrote shows in a result."""

    def __init__(self, size: int, programs: int) -> None:
        self.size = size
        self.bytes = np.empty(max(size * programs, 1), np.uint8)
        self.poison(slice(None))
        self.accesses = Accesses(size * programs)

    def touch(self, addresses: np.ndarray, by: Threads, writes: bool) -> np.ndarray:
        inside = (addresses >= 0) & (addresses < self.size)
        expect(inside, f"a thread {'writes' if writes else 'reads'} outside of its shared memory")
        places = addresses + by.programs.reshape(addresses.shape) * self.size
        (self.accesses.write if writes else self.accesses.read)(places.ravel(), by)
        return places

    def write(self, places: np.ndarray, by: Threads) -> None:
        """What was on its way arrives."""
        self.accesses.write(places.ravel(), by)

    def poison(self, places: np.ndarray | slice) -> None:
        self.bytes[places] = 0xFF  # a NaN in every type


def put(space: GlobalMemory | SharedMemory, places: np.ndarray, written: np.ndarray) -> None:
    """Several threads may write the same at once: from Triton 3.8 on, sums of warps that hold the same numbers do."""
    space.bytes[places] = written
    expect(space.bytes[places] == written, "threads write different numbers to the same place")


class _Region:
    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def _memory(address: int, size: int) -> np.ndarray:
    return np.asarray(_Region(address, size))
