"""What a Triton kernel becomes on a GPU, on a machine without one: its wheel carries an assembler and the inverse."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)(.*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class MachineCode:
    """The instructions of one kernel, and where the loops among them begin and end."""

    instructions: list[str]
    loops: list[tuple[int, int]]
    stack_bytes: int
    intermediate: str

    def count(self, name: str, of: tuple[int, int] | None = None) -> int:
        first, last = of or (0, len(self.instructions))
        return sum(instruction.startswith(name) for instruction in self.instructions[first:last])

    @property
    def hot_loop(self) -> tuple[int, int]:
        """The innermost loop that loads most."""
        inner = [a for a in self.loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in self.loops)]
        return max(inner, key=lambda loop: self.count("LDG", loop))


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    capability: int,
    folder: Path,
    divisor: int = 16,
) -> MachineCode:
    """`kernel` for one compute capability; whole numbers and addresses are multiples of `divisor`: mostly 16."""
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", divisor]] for name in types}
    made = made_for(capability, kernel, types, constants, attributes, num_warps=warps, num_stages=1)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    text, usage = _run("nvdisasm", "-c", cubin), _run("cuobjdump", "-res-usage", cubin)
    instructions, labels, jumps = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            if found[1] == "BRA" and (target := re.search(r"\.L_x_\d+", found[2])):
                jumps.append((target[0], len(instructions) + 1))
            instructions.append(found[1])
    loops = [(labels[target], end) for target, end in jumps if labels[target] < end - 1]
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack and instructions, usage
    return MachineCode(instructions, loops, int(stack[1]), made.asm["ttir"])


def made_for(
    capability: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[tuple[int], list[list[object]]],
    **options: int,
) -> CompiledKernel:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _run(tool: str, *arguments: object) -> str:
    command = [str(_TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
