"""PTX, NVIDIA's assembly language, as a program that can be looked at: what `ptx_machine.py` executes.

The language: NVIDIA, Parallel Thread Execution ISA (docs.nvidia.com/cuda/parallel-thread-execution).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_PARAMETER = re.compile(r"\.param\s.*?(\w+)(?:\[\d+\])?,?$")
_LABEL = re.compile(r"(\$?\w+):$")
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_TOKEN = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+")
_TYPE = re.compile(r"(?:pred|bf16x2|bf16|[busf]\d+(?:x2)?)$")
_SHARED = re.compile(r"(\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\];")
_IGNORED = ("//", ".address_size", ".extern", ".file", ".loc", ".pragma", ".reqntid", ".section", ".shared", ".target")


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


Operand = str | int | np.floating | Address | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers.types operands`, the types as they stand, the last one last."""

    text: str
    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str = ""  # a predicate; without one, every thread takes part
    negated: bool = False


@dataclass
class Program:
    parameters: list[str] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)  # bits of a register, by the letters before its number
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # where each variable in shared memory begins
    shared_bytes: int = 0  # of those whose size is known

    def bits(self, register: str) -> int:
        """How wide a register is; 1 for a predicate."""
        return self.widths.get(register) or self.widths[register.rstrip("0123456789")]


def parse(text: str) -> Program:
    """The one kernel of a module."""
    entry = re.search(r"\.entry\s+\w+\(", text)
    assert entry, "no kernel"
    program = Program()
    head, _, rest = text[entry.end() :].partition("{")
    program.parameters = [found[1] for line in head.splitlines() if (found := _PARAMETER.match(line.strip()))]
    for raw in rest.splitlines():
        line = raw.partition("//")[0].strip()
        if line == "}" and raw.startswith("}"):  # of the kernel, not of a scope in it
            break
        _read(program, line)
    for external, align, name, size in sorted(_SHARED.findall(text)):  # what a launch adds stands behind all others
        program.shared_bytes = -(-program.shared_bytes // int(align)) * int(align)
        program.shared[name] = program.shared_bytes
        program.shared_bytes += int(size or 0)
        assert bool(external) != bool(size), name
    return program


def _read(program: Program, line: str) -> None:
    """A label or statements, in a scope of their own or not."""
    if line.startswith("{"):
        line = line[1:].strip()
    if line.count("}") > line.count("{"):
        line = line.removesuffix("}").strip()
    if found := _LABEL.match(line):
        program.labels[found[1]] = len(program.instructions)
        return
    for statement in line.split(";"):
        one = statement.strip()
        if found := _REGISTERS.match(one):
            for name in found[2].split(","):
                program.widths[name.strip().partition("<")[0]] = 1 if found[1] == "pred" else int(found[1][1:])
        elif one and not one.startswith(_IGNORED):
            program.instructions.append(_instruction(one))


def _instruction(text: str) -> Instruction:
    guard, negated, rest = "", False, text
    if found := _GUARD.match(text):
        negated, guard, rest = found[1] == "!", found[2], found[3]
    code, operands = (*rest.split(maxsplit=1), "")[:2]
    name, *parts = code.replace(".shared::cta", ".shared").split(".")  # which are the same
    types = tuple(part for part in parts if _TYPE.match(part))
    modifiers = tuple(part for part in parts if not _TYPE.match(part))
    places = re.sub(r"(%\w+)\|(%\w+)", r"{\1, \2}", operands)  # two results
    return Instruction(text, name, modifiers, types, tuple(map(_operand, _TOKEN.findall(places))), guard, negated)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(map(_operand, _TOKEN.findall(text[1:-1])))
    if text.startswith("["):
        found = _ADDRESS.match(text)
        assert found, text
        return Address(found[1], int(found[2] or 0))
    if re.match(r"0f[0-9A-Fa-f]{8}$", text):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if re.match(r"0d[0-9A-Fa-f]{16}$", text):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    if re.match(r"-?(0x[0-9A-Fa-f]+|\d+)U?$", text):
        return int(text.rstrip("U"), 0)
    return text
