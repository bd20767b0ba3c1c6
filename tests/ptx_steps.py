"""What each instruction does that a thread executes by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import ptx_alu as alu
from ptx import Address, Instruction
from ptx_machine import Machine
from ptx_memory import put

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
    rest = "u32" if one.name in ("shl", "shr", "bfe") else kind  # of where and how far
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


def _branch(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target = one.operands[0]
    assert isinstance(target, str)
    machine.next[taken] = machine.code.labels[target]


def _return(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    machine.next[taken] = len(machine.code.instructions)


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
    threads, space = np.flatnonzero(taken), machine.space(one)
    places = machine.touch(address, space, to.itemsize * len(targets), threads, writes=False)
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
    threads, space = np.flatnonzero(taken), machine.space(one)
    values = [np.broadcast_to(machine.get(part, kind), machine.count)[threads] for part in sources]
    size = alu.numpy_type(kind).itemsize * len(sources)
    places = machine.touch(address, space, size, threads, writes=True)
    put(space, places, np.stack(values, 1).view(np.uint8).reshape(threads.size, size))


def _start_copy(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """`cp.async`: what arrives at any time until it is waited for; until then, nobody finds anything there."""
    target, source, size, *sources = one.operands
    assert isinstance(target, Address) and isinstance(source, Address) and size == 16, one.text
    threads = np.flatnonzero(taken)
    count = machine.get(sources[0], "u32") if sources else np.full(1, size)
    there = np.broadcast_to(count, machine.count)[threads]
    assert np.isin(there, (0, size)).all(), one.text
    places = machine.touch(target, machine.shared, size, threads, writes=True)
    bytes_ = np.zeros((threads.size, size), np.uint8)
    bytes_[there > 0] = machine.memory.bytes[
        machine.touch(source, machine.memory, size, threads[there > 0], writes=False)
    ]
    machine.shared.poison(places)
    machine.copies.append((threads, places, bytes_))


def _wait_for_copies(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    left = []
    for threads, places, bytes_ in machine.copies:
        mine = taken[threads]
        machine.shared.write(places[mine], machine.by(threads[mine], places.shape[1]))
        put(machine.shared, places[mine], bytes_[mine])
        if not mine.all():
            left.append((threads[~mine], places[~mine], bytes_[~mine]))
    machine.copies = left


def _copy(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    if "wait_all" in one.modifiers:
        _wait_for_copies(machine, one, taken)
    elif "bulk" in one.modifiers:
        assert "prefetch" in one.modifiers, one.text  # a hint
    else:
        _start_copy(machine, one, taken)


def _nothing(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """Launches of a stream that overlap: here they do not."""


STEPS: dict[str, Step] = dict.fromkeys(alu.PLAIN, _plain) | {
    "mov": _move,
    "cvta": _move,
    "selp": _select,
    "setp": _set_predicate,
    "cvt": _convert,
    "lop3": _logic,
    "bra": _branch,
    "ret": _return,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "griddepcontrol": _nothing,
}
