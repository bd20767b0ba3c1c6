"""Executes PTX: all threads of a launch at once, an instruction at a time, in numpy.

Threads of one warp run together, as they do between two branches; those that went different ways take turns, those
furthest behind first. Blocks do not know of each other. `ptx_memory.py` says what no thread may do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

import ptx_alu as alu
from ptx import Address, Instruction, Operand, Program
from ptx_memory import Faults, GlobalMemory, SharedMemory, Threads, expect

Memory = GlobalMemory | SharedMemory
WARP = 32
_ALL = np.uint32(0xFFFFFFFF)


class Machine:
    """The threads of one launch, their registers and memories."""

    def __init__(
        self, code: Program, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Tensor | int]
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
            self.parameters[name] = given if isinstance(given, int) else given.data_ptr()
        self.memory = GlobalMemory([one for one in arguments if isinstance(one, Tensor)])
        self.shared = SharedMemory(shared_bytes, programs)
        self.passed = np.zeros(programs, np.int64)  # barriers
        self.next = np.zeros(self.count, np.int64)  # the instruction of each thread

    def run(self) -> None:
        """Until every thread has returned. Raises `Faults`."""
        instructions = self.code.instructions
        end = len(instructions)
        with np.errstate(all="ignore"):
            while (at := int(self.next.min(initial=end))) < end:
                here = self.next == at
                self.next[here] = at + 1
                one = instructions[at]
                expect(one.name in _STEPS, f"{one.text}: no instruction that kernels of ours are made of")
                try:
                    _STEPS[one.name](self, one, here & self._guard(one) if one.guard else here)
                except Faults as fault:
                    raise Faults(f"{fault}: {one.text}") from None

    def _guard(self, one: Instruction) -> np.ndarray:
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
        if operand == "global_smem":
            return np.zeros(1, to)
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

    def meet(self, taken: np.ndarray, what: str) -> None:
        """Raises unless of each warp all threads take part or none."""
        of_warp = taken.reshape(-1, WARP)
        expect(of_warp.all(1) | ~of_warp.any(1), f"{what} that some threads of a warp do not reach")

    def wait(self, taken: np.ndarray) -> None:
        """At a barrier of each program that takes part."""
        gone = self.next == len(self.code.instructions)
        arrived, gone = (one.reshape(self.programs, self.threads) for one in (taken, gone))
        some = arrived.any(1)
        expect((arrived | gone).all(1) | ~some, "a barrier that some threads do not reach")
        self.passed[some] += 1


Step = Callable[[Machine, Instruction, np.ndarray], None]


def _plain(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    kind, sources = one.types[-1], one.operands[1:]
    if one.name in ("add", "sub", "mul", "fma") and kind in alu.PAIRS:
        of = alu.PAIRS[kind]
        pairs = (machine.get(a, f"b{16 * of.itemsize}").view(of).reshape(-1, 2) for a in sources)
        result = np.ascontiguousarray(alu.PLAIN[one.name](*pairs)).view(np.dtype(f"u{2 * of.itemsize}"))
        machine.set(one.operands[0], result[:, 0], taken)
        return
    if len(one.types) == 2:  # all but the last operand are narrower
        *narrow, last = sources
        wide = (alu.convert(machine.get(a, kind), "f32", kind, ()) for a in narrow)
        assert one.types[0] == "f32", one.text
        machine.set(one.operands[0], alu.PLAIN[one.name](*wide, machine.get(last, "f32")), taken)
        return
    if kind == "pred":
        machine.set(one.operands[0], alu.PLAIN[one.name](*(machine.get(a, "pred") for a in sources)), taken)
        return
    assert kind != "bf16", one.text
    if "wide" in one.modifiers or "hi" in one.modifiers:  # of products
        _double(machine, one, taken)
        return
    rest = "u32" if one.name in ("shl", "shr", "bfe") else kind
    operands = [machine.get(a, rest if i else kind) for i, a in enumerate(sources)]
    machine.set(one.operands[0], alu.PLAIN[one.name](*operands), taken)


def _double(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """A product twice as wide as its factors, or the upper half of it."""
    kind, (target, a, b, *rest) = one.types[-1], one.operands
    bits = int(kind[1:])
    double = f"{kind[0]}{2 * bits}"
    x, y = (machine.get(factor, kind).astype(alu.numpy_type(double)) for factor in (a, b))
    if "hi" in one.modifiers:
        assert not rest, one.text
        machine.set(target, (x * y >> bits).astype(alu.numpy_type(kind)), taken)
    else:
        machine.set(target, alu.PLAIN[one.name](x, y, *(machine.get(c, double) for c in rest)), taken)


def _move(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, source = one.operands
    kind = one.types[-1]
    if isinstance(target, tuple) or isinstance(source, tuple):
        parts = target if isinstance(target, tuple) else source
        assert isinstance(parts, tuple)
        bits = int(kind[1:]) // len(parts)
        if isinstance(target, tuple):
            whole = machine.get(source, kind)
            for i, part in enumerate(parts):
                machine.set(part, (whole >> whole.dtype.type(i * bits)).astype(np.dtype(f"u{bits // 8}")), taken)
        else:
            whole = np.zeros(1, alu.numpy_type(kind))
            for i, part in enumerate(parts):
                whole = whole | machine.get(part, f"b{bits}").astype(whole.dtype) << whole.dtype.type(i * bits)
            machine.set(target, whole, taken)
    else:
        machine.set(target, machine.get(source, kind), taken)


def _select(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, a, b, condition = one.operands
    value = np.where(machine.get(condition, "pred"), machine.get(a, one.types[-1]), machine.get(b, one.types[-1]))
    machine.set(target, value, taken)


def _set_predicate(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, a, b, *rest = one.operands
    kind = one.types[-1]
    x, y = machine.get(a, kind), machine.get(b, kind)
    if kind == "bf16":
        x, y = alu.widen_bfloat16(x), alu.widen_bfloat16(y)
    how, *logic = [word for word in one.modifiers if word != "ftz"]
    value = alu.compare(how, x, y)
    if rest:
        value = alu.PLAIN[logic[0]](value, machine.get(rest[0], "pred"))
    assert not isinstance(target, tuple), one.text
    machine.set(target, value, taken)


def _convert(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    to, source = one.types
    if to.endswith("x2"):
        numbers = (alu.convert(machine.get(a, source), to[:-2], source, ()) for a in one.operands[1:])
        high, low = (number.view(np.uint16).astype(np.uint32) for number in numbers)
        machine.set(one.operands[0], high << np.uint32(16) | low, taken)
        return
    machine.set(one.operands[0], alu.convert(machine.get(one.operands[1], source), to, source, one.modifiers), taken)


def _logic(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, a, b, c, table = one.operands
    assert isinstance(table, int)
    machine.set(target, alu.logic(*(machine.get(x, "b32") for x in (a, b, c)), table), taken)


def _shuffle(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    machine.meet(taken, "a shuffle")
    target, a, b, c, members = one.operands
    assert not isinstance(target, tuple) and np.all(machine.get(members, "b32") == _ALL), one.text
    by, control, lane = (machine.get(b, "b32").astype(np.int64), machine.get(c, "b32").astype(np.int64), machine.lane)
    segment = control >> 8 & 31
    last = (lane & segment) | (control & 31 & ~segment)
    how = one.modifiers[-1]
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[how]
    valid = other >= last if how == "up" else other <= last
    source = np.arange(machine.count) - lane + np.where(valid, other, lane)
    machine.set(target, np.broadcast_to(machine.get(a, "b32"), machine.count)[source], taken)


def _reduce(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    machine.meet(taken, "a reduction")
    target, a, members = one.operands
    assert np.all(machine.get(members, "b32") == _ALL), one.text
    of_warp = np.broadcast_to(machine.get(a, one.types[-1]), machine.count).reshape(-1, WARP)
    functions: dict[str, Any] = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}
    result = functions[one.modifiers[-1]].reduce(of_warp, 1, dtype=of_warp.dtype)
    machine.set(target, np.repeat(result, WARP), taken)


def _branch(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target = one.operands[0]
    assert isinstance(target, str)
    machine.next[taken] = machine.code.labels[target]


def _return(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    machine.next[taken] = len(machine.code.instructions)


def _barrier(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    if "warp" in one.modifiers:
        machine.meet(taken, "a barrier")
    else:
        machine.wait(taken)


def _touch(
    machine: Machine, address: Address, space: Memory, size: int, threads: np.ndarray, writes: bool
) -> np.ndarray:
    """The places of the `size` bytes that each of `threads` accesses, [threads, size], once nothing forbids it."""
    base = machine.get(address.base, "u32" if space is machine.shared else "s64").astype(np.int64)
    first = np.broadcast_to(base, machine.count)[threads] + address.offset
    expect(first % size == 0, f"a thread {'writes' if writes else 'reads'} where its width does not divide the address")
    program = machine.program_of[threads]
    by = Threads(machine.warp[threads], program, machine.passed[program], size)
    return space.touch(first[:, None] + np.arange(size), by, writes)


def _space(machine: Machine, one: Instruction) -> Memory:
    assert "shared" in one.modifiers or "global" in one.modifiers, one.text
    return machine.shared if "shared" in one.modifiers else machine.memory


def _load(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, address = one.operands
    assert isinstance(address, Address)
    kind = one.types[-1]
    to = alu.numpy_type(kind)
    if "param" in one.modifiers:
        value = machine.parameters[address.base] & (1 << 8 * to.itemsize) - 1
        machine.set(target, np.full(1, value, np.dtype(f"u{to.itemsize}")).view(to), taken)
        return
    targets = target if isinstance(target, tuple) else (target,)
    threads, space = np.flatnonzero(taken), _space(machine, one)
    places = _touch(machine, address, space, to.itemsize * len(targets), threads, writes=False)
    loaded = space.bytes[places].view(to).reshape(threads.size, len(targets))
    for i, part in enumerate(targets):
        value = np.zeros(machine.count, to)
        value[threads] = loaded[:, i]
        machine.set(part, value, taken)


def _store(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    address, source = one.operands
    assert isinstance(address, Address)
    kind = one.types[-1]
    sources = source if isinstance(source, tuple) else (source,)
    threads, space = np.flatnonzero(taken), _space(machine, one)
    values = [np.broadcast_to(machine.get(part, kind), machine.count)[threads] for part in sources]
    size = alu.numpy_type(kind).itemsize * len(sources)
    places = _touch(machine, address, space, size, threads, writes=True)
    space.bytes[places] = np.stack(values, 1).view(np.uint8).reshape(threads.size, size)


def _load_matrix(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """`ldmatrix`: 8 x 8 entries of 16 bits each, whose rows are where every eight lanes in turn say."""
    machine.meet(taken, "a load of matrices")
    targets, address = one.operands
    assert isinstance(targets, tuple) and isinstance(address, Address)
    threads = np.flatnonzero(taken)
    threads = threads[machine.lane[threads] < 8 * len(targets)]
    places = _touch(machine, address, machine.shared, 16, threads, writes=False)
    rows = machine.shared.bytes[places].view(np.uint16).reshape(-1, len(targets), 8, 8)
    if "trans" in one.modifiers:
        rows = rows.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, len(targets), WARP)
    for i, target in enumerate(targets):
        value = np.zeros(machine.count, np.uint32)
        value[taken] = pairs[:, i].ravel()
        machine.set(target, value, taken)


def _store_matrix(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """`stmatrix`, the inverse."""
    machine.meet(taken, "a store of matrices")
    address, sources = one.operands
    assert isinstance(sources, tuple) and isinstance(address, Address)
    threads = np.flatnonzero(taken)
    pairs = [np.broadcast_to(machine.get(part, "b32"), machine.count)[taken].reshape(-1, WARP) for part in sources]
    rows = np.ascontiguousarray(np.stack(pairs, 1)).view(np.uint16).reshape(-1, len(sources), 8, 8)
    if "trans" in one.modifiers:
        rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
    threads = threads[machine.lane[threads] < 8 * len(sources)]
    places = _touch(machine, address, machine.shared, 16, threads, writes=True)
    machine.shared.bytes[places] = rows.reshape(-1, 8).view(np.uint8)


_STEPS: dict[str, Step] = dict.fromkeys(alu.PLAIN, _plain) | {
    "mov": _move,
    "selp": _select,
    "setp": _set_predicate,
    "cvt": _convert,
    "lop3": _logic,
    "shfl": _shuffle,
    "redux": _reduce,
    "bra": _branch,
    "ret": _return,
    "bar": _barrier,
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
}
