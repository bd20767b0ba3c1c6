"""What each instruction does that the threads of a warp, or of a program, execute together."""

from __future__ import annotations

from typing import Any

import numpy as np

import ptx_alu as alu
from ptx import Address, Instruction
from ptx_machine import WARP, Machine
from ptx_steps import Step

_ALL = np.uint32(0xFFFFFFFF)


def _shuffle(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, a, b, c, members = one.operands
    assert np.all(machine.get(members, "b32") == _ALL), one.text
    by, control, lane = (machine.get(b, "b32").astype(np.int64), machine.get(c, "b32").astype(np.int64), machine.lane)
    segment = control >> 8 & 31
    last = (lane & segment) | (control & 31 & ~segment)
    how = one.modifiers[-1]
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[how]
    valid = other >= last if how == "up" else other <= last
    source = np.arange(machine.count) - lane + np.where(valid, other, lane)
    found = np.broadcast_to(machine.get(a, "b32"), machine.count)[source]
    if isinstance(target, tuple):
        machine.set(target[1], valid, taken)
    machine.set(target[0] if isinstance(target, tuple) else target, found, taken)


def _reduce(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, a, members = one.operands
    assert np.all(machine.get(members, "b32") == _ALL), one.text
    of_warp = np.broadcast_to(machine.get(a, one.types[-1]), machine.count).reshape(-1, WARP)
    functions: dict[str, Any] = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}
    result = functions[one.modifiers[-1]].reduce(of_warp, 1, dtype=of_warp.dtype)
    machine.set(target, np.repeat(result, WARP), taken)


def _barrier(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    if "warp" in one.modifiers:
        return
    machine.passed[machine.program_of[taken]] += 1
    if "red" in one.modifiers:
        assert "or" in one.modifiers and one.types == ("pred",), one.text
        target, _, condition = one.operands
        found = np.broadcast_to(machine.get(condition, "pred"), machine.count) & taken
        machine.set(target, np.repeat(found.reshape(machine.programs, -1).any(1), machine.threads), taken)


def _load_matrix(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """`ldmatrix`: 8 x 8 entries of 16 bits each, whose rows are where every eight lanes in turn say."""
    targets, address = one.operands
    assert isinstance(targets, tuple) and isinstance(address, Address)
    threads = np.flatnonzero(taken)
    threads = threads[machine.lane[threads] < 8 * len(targets)]
    places = machine.touch(address, machine.shared, 16, threads, writes=False)
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
    address, sources = one.operands
    assert isinstance(sources, tuple) and isinstance(address, Address)
    threads = np.flatnonzero(taken)
    pairs = [np.broadcast_to(machine.get(part, "b32"), machine.count)[taken].reshape(-1, WARP) for part in sources]
    rows = np.ascontiguousarray(np.stack(pairs, 1)).view(np.uint16).reshape(-1, len(sources), 8, 8)
    if "trans" in one.modifiers:
        rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
    threads = threads[machine.lane[threads] < 8 * len(sources)]
    places = machine.touch(address, machine.shared, 16, threads, writes=True)
    machine.shared.bytes[places] = rows.reshape(-1, 8).view(np.uint8)


def _vote(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    target, condition, members = one.operands
    assert "ballot" in one.modifiers and np.all(machine.get(members, "b32") == _ALL), one.text
    of_warp = np.broadcast_to(machine.get(condition, "pred"), machine.count).reshape(-1, WARP)
    bits = (of_warp.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
    machine.set(target, np.repeat(bits, WARP), taken)


def _multiply_matrices(machine: Machine, one: Instruction, taken: np.ndarray) -> None:
    """`mma` of bfloat16: a [16, 16] by b [16, 8] plus c [16, 8].

    A thread holds pairs of columns 2 (lane % 4) of row lane // 4 of each 8 x 8 quarter; of b, of its transpose.
    """
    assert one.modifiers == ("sync", "aligned", "m16n8k16", "row", "col"), one.text
    assert one.types == ("f32", "bf16", "bf16", "f32"), one.text
    target, *operands = one.operands

    def quarters(operand: Any) -> np.ndarray:
        """[warps, registers, 8, 8] of pairs in registers of 32 bits."""
        held = [np.broadcast_to(machine.get(part, "b32"), machine.count).reshape(-1, WARP) for part in operand]
        pairs = np.ascontiguousarray(np.stack(held, 1)).view(np.uint16)
        return alu.widen_bfloat16(pairs).astype(np.float64).reshape(-1, len(held), 8, 8)

    upper_left, lower_left, upper_right, lower_right = quarters(operands[0]).transpose(1, 0, 2, 3)
    a = np.concatenate([np.concatenate([upper_left, upper_right], 2), np.concatenate([lower_left, lower_right], 2)], 1)
    b = np.concatenate(list(quarters(operands[1]).transpose(1, 0, 3, 2)), 1)
    sums = [np.broadcast_to(machine.get(part, "f32"), machine.count).reshape(-1, 8, 4) for part in operands[2]]
    products = a @ b
    for i, part in enumerate(target):
        # Two of each row: columns 2 (lane % 4) and the next one, of rows lane // 4 and eight below.
        own = products[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2]
        machine.set(part, (own + sums[i]).astype(np.float32).ravel(), taken)


def threads_that_meet(machine: Machine, one: Instruction) -> int:
    """Of how many threads each one waits for all others before any executes `one` of `STEPS`."""
    return machine.threads if one.name == "bar" and "warp" not in one.modifiers else WARP


STEPS: dict[str, Step] = {
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "bar": _barrier,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply_matrices,
}
