"""Runs PTX: all threads of a launch at once, an instruction at a time.

Threads run together as long as they go the same way; those that went different ways take turns, those furthest behind
first. Programs do not know of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

import ptx_steps
import ptx_warps
from ptx import Program
from ptx_machine import Machine
from ptx_memory import Faults, expect

_STEPS = ptx_steps.STEPS | ptx_warps.STEPS


def run(
    code: Program, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]
) -> None:
    """One launch, until every thread has returned; `shared_bytes` besides those that the code declares.

    Raises `Faults` for what no thread may do.
    """
    machine = Machine(code, grid, threads, shared_bytes, arguments)
    end = len(code.instructions)
    waits = np.zeros(machine.count, bool)  # for the others of its warp or program, at its next instruction
    with np.errstate(all="ignore"):
        while (at := int(machine.next.min(where=~waits, initial=end))) < end:
            one = code.instructions[at]
            expect(one.name in _STEPS, f"{one.text}: no instruction that kernels of ours are made of")
            here = machine.next == at
            taken = here & machine.guard(one) if one.guard else here
            if one.name in ptx_warps.STEPS:
                complete = taken.reshape(-1, ptx_warps.threads_that_meet(machine, one)).all(1, keepdims=True)
                waits[here] = taken[here]
                taken = np.repeat(complete, machine.count // complete.size)
                waits[taken] = False
                here = here & ~waits
            machine.next[here] = at + 1
            try:
                _STEPS[one.name](machine, one, taken)
            except Faults as fault:
                raise Faults(f"{fault}: {one.text}") from None
    if waits.any():
        raise Faults(f"threads wait for others that do not come: {code.instructions[machine.next[waits][0]].text}")
    expect(not machine.copies, "copies that nobody waits for")
