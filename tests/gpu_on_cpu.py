"""Runs the CUDA sources on the CPU: built by the host's compiler on top of gpu_shim/shim.h, under sanitizers."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from offpath.kernels.gpu import bucketed, launch, nvrtc
from offpath.kernels.gpu.buckets import ROWS, TOKENS, Buckets
from offpath.kernels.gpu.decode import shared_bytes_of
from offpath.kernels.gpu.formats import STRIDE, Packed
from offpath.kernels.gpu.n4 import GROUP
from offpath.kernels.gpu.regions import Regions
from offpath.kernels.gpu.tensor_cores import defines_of, shared_bytes_of as shared_bytes_of_tiles
from offpath.kernels.gpu.tiles import TILE_ROWS, Tiles

SHIM = Path(__file__).parent / "gpu_shim" / "shim.h"
COMPILER = shutil.which("c++") or shutil.which("g++")
OPTIONS = ["-std=c++17", "-O0", "-ffp-contract=off", "-w"]
CHECKERS = {"memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "races": ["-fsanitize=thread"]}
# What ThreadSanitizers of older compilers cannot map is an address space laid out at random, as newer kernels do.
_FIXED = ["setarch", "-R"]
FIXED_LAYOUT = (
    _FIXED if shutil.which("setarch") and not subprocess.run([*_FIXED, "true"], check=False).returncode else []
)
WARPS = 2


@dataclass(frozen=True)
class Variant:
    """A kernel of a source with its options, `edit` (a text, and what replaces it) made."""

    source: str
    kernel: str
    defines: tuple[tuple[str, int], ...]
    edit: tuple[str, str] | None = None

    @property
    def edited(self) -> str:
        code = nvrtc.text_of(self.source)
        if self.edit is not None:
            assert self.edit[0] in code, f"{self.source} does not contain {self.edit[0]!r}"
            code = code.replace(*self.edit)
        return code

    @property
    def names(self) -> dict[str, int]:
        return {"WARPS": WARPS, "BLOCKS": 1, "PREFETCH": 0} | dict(self.defines)

    def code(self, namespace: str) -> str:
        code = self.edited.replace("extern __shared__ uint4 shared[];", "").replace('extern "C"', "")
        names = self.names.items()
        define = "".join(f"#define {name} {value}\n" for name, value in names)
        undefine = "".join(f"#undef {name}\n" for name, _ in names)
        return f"{define}namespace {namespace} {{\n{code}\n}}\n{undefine}"


class Programs:
    """Variants compiled into one program, since the compiler's start takes longer than a kernel."""

    def __init__(self, path: Path, variants: list[Variant], checker: str = "memory") -> None:
        self.command = [*(FIXED_LAYOUT if checker == "races" else ()), str(path)]
        self.numbers = {variant: number for number, variant in enumerate(dict.fromkeys(variants))}
        parts = [f'#include "{SHIM}"\n', *(variant.code(f"variant_{i}") for variant, i in self.numbers.items())]
        cases = [f"case {i}: return shim::launch(variant_{i}::{v.kernel});\n" for v, i in self.numbers.items()]
        parts += ["int main() {\nswitch (shim::take<int>()) {\n", *cases, "}\nreturn 2;\n}\n"]
        assert COMPILER is not None, "no C++ compiler"
        command = [COMPILER, "-x", "c++", *OPTIONS, *CHECKERS[checker], "-", "-o", str(path)]
        built = subprocess.run(command, check=False, input="".join(parts), text=True, capture_output=True)
        assert built.returncode == 0, built.stderr

    def run(
        self,
        variant: Variant,
        grid: tuple[int, int],
        shared_bytes: int,
        *arguments: Tensor | int | None,
        backwards: bool = False,
    ) -> None:
        """One launch; tensors become what the kernel leaves. `backwards`: blocks and threads in reverse order."""
        threads = variant.names["WARPS"] * 32
        told = [struct.pack("6i", self.numbers[variant], *grid, threads, shared_bytes, backwards)]
        tensors = []
        for argument in arguments:
            if isinstance(argument, int):
                told.append(struct.pack("i", argument))
            else:
                tensor = torch.empty(0) if argument is None else argument
                assert tensor.is_contiguous()
                tensors.append(tensor)
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                told += [struct.pack("Q", len(raw)), raw]
        ran = subprocess.run(self.command, check=False, input=b"".join(told), capture_output=True, timeout=60)
        if ran.returncode:
            raise RuntimeError(ran.stderr.decode())
        came = ran.stdout
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if size:
                tensor.copy_(torch.frombuffer(bytearray(came[:size]), dtype=tensor.dtype).view(tensor.shape))
            came = came[size:]
        assert not came


class Launcher:
    """In the place of `driver.load`: kernels whose launches run on the CPU, with the tensors at their addresses, which
    must still be there.

    `launches` has (kernel, grid, threads) of each.
    """

    def __init__(self, programs: Programs, patch: pytest.MonkeyPatch) -> None:
        self.programs, self.launches = programs, list[tuple[str, tuple[int, int], int]]()
        self.seen: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...]]] = {}
        address = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            whole = tensor if tensor._base is None else tensor._base
            self.seen[address(tensor)] = weakref.ref(whole), (tensor.shape, tensor.stride(), tensor.storage_offset())
            return address(tensor)

        patch.setattr(Tensor, "data_ptr", data_ptr)
        patch.setattr(launch, "INTERPRETED", True)  # or tensors of the CPU would be refused

    def load(self, source: str, name: str, device: torch.device, **defines: int) -> SimpleNamespace:
        variant = Variant(source, name, tuple(defines.items()))

        def run(grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: int) -> None:
            assert threads == variant.names["WARPS"] * 32
            self.launches.append((name, grid, threads))
            parameters = re.search(rf"\b{name}\(([^)]*)\)", variant.code("_"))[1].split(",")
            operands = [
                (self._at(argument) if argument else None) if "*" in parameter else argument
                for parameter, argument in zip(parameters, arguments, strict=True)
            ]
            self.programs.run(variant, grid, shared_bytes, *operands)

        return SimpleNamespace(launch=run, resident_blocks=lambda threads, shared_bytes: 4)

    def _at(self, address: int) -> Tensor:
        whole, view = self.seen[address]
        memory = whole()
        assert memory is not None, "a tensor whose address was taken is gone before the launch"
        return memory.as_strided(*view)


def decode_variant(
    kind: str, dtype: torch.dtype, batch: int, staged: bool = True, edit: tuple[str, str] | None = None
) -> Variant:
    defines = {"BATCH": batch, "N4": kind == "n4", "BF16": dtype is torch.bfloat16, "STAGED": staged, "STRIDE": STRIDE}
    return Variant("decode.cu", "decode", (*((n, int(v)) for n, v in defines.items()), ("DEPTH", 2)), edit)


def decode(
    programs: Programs,
    variant: Variant,
    packed: Packed,
    x: Tensor,
    bias: Tensor | None = None,
    blocks: int = 3,
    backwards: bool = False,
) -> Tensor:
    """`offpath.kernels.gpu.decode.decode` on the CPU, its output poisoned before."""
    defines = dict(variant.defines)
    rows, columns = packed.shape
    y = x.new_full((x.shape[0], rows), torch.nan)
    shared_bytes = shared_bytes_of(columns, defines["BATCH"], x.dtype) if defines["STAGED"] else 0
    operands = [packed.values, packed.columns, packed.gaps, packed.group_offsets, x, bias]
    sizes = (rows, columns, x.shape[0], packed.values.numel() // GROUP)
    programs.run(variant, (blocks, 1), shared_bytes, *operands, y, *sizes, backwards=backwards)
    return y


def reduce_variant(dtype: torch.dtype, edit: tuple[str, str] | None = None) -> Variant:
    return Variant("reduce.cu", "reduce", (("BF16", int(dtype is torch.bfloat16)),), edit)


def sum_parts(
    programs: Programs, variant: Variant, partial: Tensor, bias: Tensor | None, y: Tensor, backwards: bool
) -> None:
    parts, tokens, n_outputs = partial.shape
    blocks = -(-y.numel() // (WARPS * 32))
    programs.run(variant, (blocks, 1), 0, partial, bias, y, n_outputs, tokens, parts, backwards=backwards)


def live_variants(dtype: torch.dtype, batch: int, edit: tuple[str, str] | None = None) -> tuple[Variant, Variant]:
    defines = (("BATCH", batch), ("BF16", int(dtype is torch.bfloat16)), ("DEPTH", 2))
    return Variant("live.cu", "live", defines, edit), reduce_variant(dtype)


def live(
    programs: Programs,
    variants: tuple[Variant, Variant],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    parts: int = 3,
    backwards: bool = False,
) -> Tensor:
    """`offpath.kernels.gpu.live.live_matmul` on the CPU, its memory poisoned before."""
    tokens, (n_inputs, n_outputs) = x.shape[0], weight.shape
    partial = torch.full((parts, tokens, n_outputs), torch.nan)
    strips = -(-n_outputs // (32 * 16 // x.element_size()))
    sizes = (n_inputs, n_outputs, tokens, -(-n_inputs // parts))
    programs.run(variants[0], (strips, parts), 0, weight, x, partial, *sizes, backwards=backwards)
    y = x.new_full((tokens, n_outputs), torch.nan)
    sum_parts(programs, variants[1], partial, bias, y, backwards)
    return y


def tile_variants(tokens: int, warps: int, edit: tuple[str, str] | None = None) -> tuple[Variant, Variant]:
    defines = defines_of(tokens) | {"WARPS": warps, "BLOCKS": 1}
    return Variant("tiles.cu", "multiply_tiles", tuple(defines.items()), edit), reduce_variant(torch.bfloat16)


def multiply_tiles(
    programs: Programs,
    variants: tuple[Variant, Variant],
    tiles: Tiles,
    x: Tensor,
    bias: Tensor | None = None,
    parts: int = 2,
    backwards: bool = False,
) -> Tensor:
    """`offpath.kernels.gpu.tensor_cores.multiply_tiles` on the CPU, its memory poisoned before."""
    tokens, (rows, columns) = x.shape[0], tiles.shape
    assert columns % 8 == 0
    partial = torch.full((parts, tokens, rows), torch.nan)
    shared_bytes = shared_bytes_of_tiles(dict(variants[0].defines)["TOKENS"])
    operands = tiles.values, tiles.places, tiles.gaps, tiles.group_offsets, x, partial
    blocks = -(-rows // TILE_ROWS)
    sizes = rows, columns // 8, tokens
    programs.run(variants[0], (blocks, parts), shared_bytes, *operands, *sizes, backwards=backwards)
    y = x.new_full((tokens, rows), torch.nan)
    sum_parts(programs, variants[1], partial, bias, y, backwards)
    return y


def bucketed_variant(dtype: torch.dtype, edit: tuple[str, str] | None = None) -> Variant:
    return Variant("bucketed_sum.cu", "bucketed_sum", tuple(bucketed.defines_of(dtype).items()), edit)


def bucketed_sum(
    programs: Programs,
    variant: Variant,
    buckets: Buckets,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    backwards: bool = False,
) -> Tensor:
    """`offpath.kernels.gpu.bucketed.planned_spmm` on the CPU, of x [columns, tokens], its output poisoned before."""
    rows, columns = buckets.shape
    y = x.new_full((rows, x.shape[1]), torch.nan)
    grid = buckets.row_order.numel() // ROWS, -(-x.shape[1] // TOKENS)
    operands = buckets.with_values(values), buckets.pair_offsets, buckets.row_order, x, bias, y
    sizes = columns, buckets.chunk_columns, buckets.most_pairs, x.shape[1]
    programs.run(variant, grid, buckets.shared_bytes, *operands, *sizes, backwards=backwards)
    return y


def dots_variant(dtype: torch.dtype, edit: tuple[str, str] | None = None) -> Variant:
    return Variant("bucketed_dots.cu", "bucketed_dots", tuple(bucketed.dots_defines_of(dtype).items()), edit)


def bucketed_dots(
    programs: Programs, variant: Variant, regions: Regions, dy: Tensor, x: Tensor, backwards: bool = False
) -> Tensor:
    """`offpath.kernels.gpu.bucketed.tiled_sddmm` on the CPU, by features, its output poisoned before."""
    dvalues = x.new_full((regions.nnz,), torch.nan)
    operands = regions.twos, regions.slots, regions.corners, regions.begins, dy, x, dvalues
    sizes = *regions.shape, regions.side, x.shape[1]
    grid = regions.corners.shape[0], 1
    programs.run(variant, grid, regions.shared_bytes, *operands, *sizes, backwards=backwards)
    return dvalues
