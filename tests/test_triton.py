"""The Triton kernels without a GPU: their results, computed in Python, and the machine code that they become."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from children import run_tests
from machine_code import MachineCode, compiled
from offpath.kernels import KernelError
from offpath.kernels.gpu import counting_sort, densely, expand, few_tokens, gather, sparse_weight, ties


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_kernel_in_python() -> None:
    """In a process of its own, as Triton decides when it is imported how kernels run."""
    files = [f"{name}_in_python.py" for name in ("triton", "gradients", "selection", "memory")]
    run_tests(files, environment={"TRITON_INTERPRET": "1"})


def test_tensors_of_the_cpu_are_refused_where_kernels_are_compiled() -> None:
    rows = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(KernelError, match="on one CUDA device"):
        gather.matmul(*rows, torch.ones(1), torch.ones(1, 4))


@dataclass(frozen=True)
class Compiled:
    """A kernel as its launcher compiles it, and how many instructions its hot loop may take for each element.

    An H200 issues 128 lanes a cycle on each of 132 multiprocessors at 1.98 GHz, 33.5e12 instructions a second of one
    lane; `limit` is what that leaves for an element at the rate at which memory hands elements over.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    elements: int  # that one lane takes in one turn of the hot loop, or in all where there is no loop
    limit: float
    multiplied_rows: int  # row numbers that are multiplied with a stride, which may pass 2^31


INDICES = {"crow_indices": "*i32", "indices": "*i32"}


def _sum(dtype: str, trusted: bool, block: int, limit: float) -> Compiled:
    pointers = dict.fromkeys(("values", "weight", "bias", "y"), f"*{dtype}")
    sizes = dict.fromkeys(("nnz", "columns", "width", "weight_stride", "y_stride"), "i32")
    constants = {"HAS_BIAS": False, "ACCUMULATOR": tl.float32, "TRUSTED": trusted, "WHOLE": True, "UNROLL": 8}
    name = f"sum of {dtype}{', trusted' if trusted else ''}"
    return Compiled(
        name,
        gather.gather_sum_kernel,
        INDICES | pointers | sizes,
        constants | {"BLOCK": block},
        1,
        block // 4,
        limit,
        2,
    )


def _dot(dtype: str, block: int, limit: float) -> Compiled:
    pointers = {"dy": f"*{dtype}", "weight": f"*{dtype}", "dots": "*fp32"}
    sizes = dict.fromkeys(("nnz", "columns", "width", "dy_stride", "weight_stride"), "i32")
    constants = {"ACCUMULATOR": tl.float32, "TRUSTED": True, "WHOLE": True, "UNROLL": 4, "BLOCK": block}
    types = INDICES | pointers | sizes
    return Compiled(f"dot of {dtype}", gather.gather_dot_kernel, types, constants, 1, block // 8, limit, 2)


def _bits(name: str, kernel: Any, limit: float) -> Compiled:
    types = {"words": "*i32", "offsets": "*i32", "values": "*bf16", "dense": "*bf16"}
    types |= dict.fromkeys(("rows", "words_of_row", "columns"), "i32")
    types |= {"row_stride": "i32"} if name == "compress" else {}
    constants = {"ALIGNED": True, "ROWS": 2, "BLOCK": 512}
    return Compiled(name, kernel, types, constants, 4, 2 * 512 * 8 // 128, limit, 2)


def _ties(name: str, kernel: Any, dtype: str, multiplied: int) -> Compiled:
    types = {"scores": f"*{dtype}", "best": f"*{dtype}"}
    if name == "count":
        types |= dict.fromkeys(("larger_counts", "equal_counts"), "*i32")
    else:
        types |= dict.fromkeys(("larger_ends", "equal_ends", "places"), "*i64")
    types |= dict.fromkeys(("k", "columns", "stride", "blocks"), "i32")
    constants = {"WIDE": tl.float32, "BLOCK": ties.BLOCK}
    return Compiled(f"{name} of {dtype}", kernel, types, constants, 4, ties.BLOCK // 128, ENCODED, multiplied)


def _few(name: str, kernel: Any, tokens: int) -> Compiled:
    types = {"crow_indices": "*i32", "indices": "*i32"}
    operands = ("values", "x", "bias", "y") if name == "few tokens" else ("dy", "x", "dvalues")
    sizes = ("columns", "rows", "tokens", "x_stride") if name == "few tokens" else ("columns", "tokens", "dy_stride")
    types |= dict.fromkeys(operands, "*bf16") | dict.fromkeys((*sizes, "x_stride"), "i32")
    constants = {"ACCUMULATOR": tl.float32, "TOKENS": tokens, "BLOCK": few_tokens.BLOCK}
    constants |= {"HAS_BIAS": False} if name == "few tokens" else {}
    elements = few_tokens.BLOCK // 32 * tokens
    # Six bytes of a connection, which all tokens share, and a gather from a cache for each of them.
    return Compiled(f"{name} of {tokens}", kernel, types, constants, 1, elements, 6 * MEMORY / tokens + GATHER, 2)


# The first-level cache hands over 128 bytes a cycle to 128 lanes: an instruction for each byte of an element.
# Of those for bfloat16, half make it float32, so there it is twice that.
CACHE = {"fp32": 4.0, "bf16": 2 * 2.0}
# The memory hands over 4.2e12 bytes a second: 8 instructions for each byte. No kernel fills more than two slots in
# three.
MEMORY = 33.5 / 4.2 * 2 / 3
# A single element: its mask, an address of 64 bits, the load, float32 of it, the multiply-add.
GATHER = 10.0
# What the product that a score comes from takes, of width 1024 at 790e12 operations a second.
ENCODED = 33.5e12 * 2 * 1024 / 790e12

KERNELS = (
    _sum("fp32", True, 128, CACHE["fp32"]),
    _sum("bf16", False, 256, 2 * MEMORY),
    _dot("fp32", 512, CACHE["fp32"]),
    _dot("bf16", 1024, CACHE["bf16"]),
    Compiled(
        "gradients",
        counting_sort.gather_by_name_kernel,
        {"starts": "*i32", "entries": "*i64", "begun": "*i32", "dots": "*fp32"}
        | dict.fromkeys(("values", "dy", "weight", "gradient", "totals"), "*bf16")
        | dict.fromkeys(("nnz", "rows", "width", "dy_stride", "weight_stride", "gradient_stride"), "i32"),
        {"ADD": False, "DOTS": True, "TOTALS": False, "ACCUMULATOR": tl.float32, "WHOLE": True, "BLOCK": 512},
        1,
        512 // 32,
        2 * MEMORY,
        3,
    ),
    Compiled(
        "gradients of an encoder",
        counting_sort.gather_by_name_kernel,
        {"starts": "*i32", "entries": "*i64", "begun": "*i32"}
        | dict.fromkeys(("values", "dy", "weight", "gradient", "dots", "totals"), "*bf16")
        | dict.fromkeys(("nnz", "rows", "width", "dy_stride", "gradient_stride"), "i32"),
        {"weight_stride": 0, "ADD": False, "DOTS": False, "TOTALS": True, "ACCUMULATOR": tl.float32, "WHOLE": True}
        | {"BLOCK": 512},
        1,
        512 // 32,
        2 * MEMORY,
        2,
    ),
    # Of a position, at half of the connections: 2 bytes of the dense weight, 1 of a value, 1/4 of the bits and offsets.
    _bits("expand", expand.expand_kernel, 3.25 * MEMORY),
    _bits("compress", expand.compress_kernel, 3.25 * MEMORY),
    Compiled(
        "transpose",
        sparse_weight.transpose_kernel,
        {"source": "*bf16", "target": "*bf16"}
        | dict.fromkeys(("rows", "columns", "padded", "source_row_stride", "target_stride"), "i32"),
        {"source_column_stride": 1, "BLOCK": 64},
        4,
        64 * 64 // 128,
        4 * MEMORY,
        2,
    ),
    _few("few tokens", few_tokens.few_tokens_kernel, 1),
    _few("few tokens", few_tokens.few_tokens_kernel, 8),
    _few("few dots", few_tokens.few_dots_kernel, 8),
    Compiled(
        "rows with their zeros",
        densely.write_kernel,
        {"places": "*i64", "entries": "*i64", "indices": "*i32", "begun": "*i32", "values": "*bf16", "dense": "*bf16"}
        | dict.fromkeys(("nnz", "rows", "columns"), "i32"),
        {"ACCUMULATOR": tl.float32, "BLOCK": densely.BLOCK},
        4,
        densely.BLOCK // 128,
        # Of an entry: its place twice, itself, its index and row, its value, and what is written.
        (2 * 8 + 8 + 2 * 4 + 2 + 2) * MEMORY,
        0,
    ),
    _ties("count", ties.count_kernel, "bf16", 3),
    _ties("place", ties.place_kernel, "fp32", 5),
)


@pytest.mark.parametrize("of", KERNELS, ids=lambda of: of.name)
def test_machine_code_of_sm_90(of: Compiled, tmp_path: Path) -> None:
    code = compiled(of.kernel, of.types, of.constants, of.warps, 90, tmp_path)
    _check(code, of)
    wide = re.findall(r"arith\.muli .*i64", code.intermediate)
    assert len(wide) >= of.multiplied_rows, "a row number is multiplied in 32 bits"
    first, last = code.hot_loop if code.loops else (0, len(code.instructions))
    said = f"{last - first} instructions for {of.elements} elements"
    if triton.__version__.startswith("3.6.") and (last - first) / of.elements > of.limit:
        pytest.skip(f"the limits are for Triton 3.7 and later; by 3.6, {said}")
    assert (last - first) / of.elements <= of.limit, said


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("of", [KERNELS[0], KERNELS[5], KERNELS[-1]], ids=lambda of: of.name)
def test_machine_code_of_others(of: Compiled, capability: int, tmp_path: Path) -> None:
    _check(compiled(of.kernel, of.types, of.constants, of.warps, capability, tmp_path), of)


@pytest.mark.parametrize("of", KERNELS, ids=lambda of: of.name)
def test_sizes_of_one_are_compiled_in(of: Compiled, tmp_path: Path) -> None:
    """Triton makes constants of them, which are no tensors: they have no methods."""
    types = {name: kind for name, kind in of.types.items() if kind.startswith("*")}
    ones = dict.fromkeys(of.types.keys() - types.keys(), 1)
    assert compiled(of.kernel, types, of.constants | ones, of.warps, 90, tmp_path).instructions


def _check(code: MachineCode, of: Compiled) -> None:
    assert code.stack_bytes == 0 and code.count("LDL") == code.count("STL") == 0, "registers are spilt"
    if of.name.startswith("few"):
        return  # a row begins where it begins: nothing there is aligned
    wide, what = (code.count("STG.E.128"), "stores") if of.name == "expand" else (code.count("LDG.E.128"), "loads")
    assert wide, f"no {what} of 16 bytes"


def test_machine_code_that_is_not_wide_is_rejected(tmp_path: Path) -> None:
    of = KERNELS[0]
    narrow = compiled(of.kernel, of.types, of.constants, of.warps, 90, tmp_path, divisor=1)
    with pytest.raises(AssertionError, match="16 bytes"):
        _check(narrow, of)
