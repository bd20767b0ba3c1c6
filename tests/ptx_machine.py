"""What executes PTX: the registers of all threads of a launch as arrays of numpy, and their memories.

`ptx_memory.py` says what no thread may do, `ptx_steps.py` and `ptx_warps.py` what the instructions do, `ptx_run.py` in
which order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

import ptx_alu as alu
from ptx import Address, Instruction, Operand, Program
from ptx_memory import GlobalMemory, SharedMemory, Threads, expect

Memory = GlobalMemory | SharedMemory
WARP = 32


class Machine:
    """The threads of one launch, their registers and memories."""

    def __init__(
        self,
        code: Program,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Tensor | int | None],
    ) -> None:
        programs = int(np.prod(grid))
        self.code, self.threads, self.programs, self.count = code, threads, programs, programs * threads
        thread = np.arange(self.count, dtype=np.int64)
        self.program_of, self.warp, self.lane = thread // threads, thread // WARP, thread % WARP
        x, y, _ = grid
        self.special = {
            "%tid.x": thread % threads,
            "%ntid.x": np.array([threads]),
            "%laneid": self.lane,
            "%ctaid.x": self.program_of % x,
            "%ctaid.y": self.program_of // x % y,
            "%ctaid.z": self.program_of // (x * y),
            **{f"%nctaid.{axis}": np.array([size]) for axis, size in zip("xyz", grid, strict=True)},
        }
        self.registers: dict[str, np.ndarray] = {}
        self.parameters = dict.fromkeys(code.parameters, 0)  # the last ones are scratch memory that nobody uses
        for name, given in zip(code.parameters, arguments, strict=False):
            self.parameters[name] = given.data_ptr() if isinstance(given, Tensor) else given or 0
        self.memory = GlobalMemory([one for one in arguments if isinstance(one, Tensor)])
        self.shared = SharedMemory(code.shared_bytes + shared_bytes, programs)
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # on their way: threads, places, bytes
        self.passed = np.zeros(programs, np.int64)  # barriers
        self.next = np.zeros(self.count, np.int64)  # the instruction of each thread

    def guard(self, one: Instruction) -> np.ndarray:
        """The threads whose predicate lets them take part."""
        guard = self.get(one.guard, "pred")
        return ~guard if one.negated else guard

    def get(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand as an array of one entry for each thread, or for all of them."""
        to = alu.numpy_type(kind)
        if isinstance(operand, int):
            return np.full(1, operand & (1 << 8 * to.itemsize) - 1, np.dtype(f"u{to.itemsize}")).view(to)
        if isinstance(operand, np.floating):
            return np.full(1, operand).view(to)
        assert isinstance(operand, str), operand
        if operand in self.special:
            return self.special[operand].astype(to)
        if operand in self.code.shared:
            return np.full(1, self.code.shared[operand], to)
        held = self.registers.get(operand)
        if held is None:  # never written: only threads that do not use it may read it
            bits = self.code.bits(operand)
            held = np.full(self.count, 0, bool if bits == 1 else np.dtype(f"u{bits // 8}"))
        if to == np.bool_ or held.dtype == np.bool_:
            assert to == held.dtype, operand
            return held
        return (held if held.itemsize == to.itemsize else held.astype(np.dtype(f"u{to.itemsize}"))).view(to)

    def set(self, operand: Operand, value: np.ndarray, taken: np.ndarray) -> None:
        assert isinstance(operand, str), operand
        if operand == "_":
            return
        bits = self.code.bits(operand)
        if bits > 1:
            if value.itemsize * 8 < bits:  # a sign goes on
                value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{bits // 8}"))
            value = value.view(np.dtype(f"u{value.itemsize}"))
            value = value.astype(np.dtype(f"u{bits // 8}"), copy=False)
        held = self.registers.get(operand)
        if held is None or taken.all():
            self.registers[operand] = np.array(np.broadcast_to(value, self.count))
        else:
            np.copyto(held, value, where=taken)

    def touch(self, address: Address, space: Memory, size: int, threads: np.ndarray, writes: bool) -> np.ndarray:
        """The places of the `size` bytes that each of `threads` accesses, [threads, size], once nothing forbids it."""
        base = self.get(address.base, "u32" if space is self.shared else "s64").astype(np.int64)
        first = np.broadcast_to(base, self.count)[threads] + address.offset
        expect(first % size == 0, f"a thread {'writes' if writes else 'reads'} at no multiple of its width")
        return space.touch(first[:, None] + np.arange(size), self.by(threads, size), writes)

    def by(self, threads: np.ndarray, size: int) -> Threads:
        program = self.program_of[threads]
        return Threads(self.warp[threads], program, self.passed[program], size)

    def space(self, one: Instruction) -> Memory:
        assert "shared" in one.modifiers or "global" in one.modifiers, one.text
        return self.shared if "shared" in one.modifiers else self.memory
