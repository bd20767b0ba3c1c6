"""The CUDA sources as NVRTC compiles them, and the machine code that comes out."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from offpath.kernels.gpu import bucketed, nvrtc
from offpath.kernels.gpu.decode import PREFETCH, TILES
from offpath.kernels.gpu.formats import STRIDE
from offpath.kernels.gpu.live import TILES as LIVE_TILES
from offpath.kernels.gpu.tensor_cores import LAUNCHES, defines_of


def shipped() -> dict[str, tuple[str, dict[str, int]]]:
    """Every kernel as the launchers ask for it."""
    found = {}
    for bf16 in (0, 1):
        for batch, (warps, blocks, depth) in TILES.items():
            tile = {"WARPS": warps, "BLOCKS": blocks, "DEPTH": depth, "PREFETCH": PREFETCH, "STRIDE": STRIDE}
            for n4 in (0, 1):
                options = {"BATCH": batch, "N4": n4, "BF16": bf16, "STAGED": 1, **tile}
                found[f"decode-{batch}-{'n4' if n4 else 'c16'}-{'bf16' if bf16 else 'fp32'}"] = ("decode.cu", options)
        for batch, (warps, blocks, depth) in LIVE_TILES.items():
            options = {"BATCH": batch, "BF16": bf16, "WARPS": warps, "BLOCKS": blocks, "DEPTH": depth}
            found[f"live-{batch}-{'bf16' if bf16 else 'fp32'}"] = ("live.cu", options)
        found[f"reduce-{'bf16' if bf16 else 'fp32'}"] = ("reduce.cu", {"BF16": bf16, "WARPS": 8})
        dtype = torch.bfloat16 if bf16 else torch.float32
        found[f"sum-{'bf16' if bf16 else 'fp32'}"] = ("bucketed_sum.cu", bucketed.defines_of(dtype))
        found[f"dots-{'bf16' if bf16 else 'fp32'}"] = ("bucketed_dots.cu", bucketed.dots_defines_of(dtype))
    for tokens in LAUNCHES:
        found[f"tiles-{tokens}"] = ("tiles.cu", defines_of(tokens))
    return found


def disassembled(source: str, capability: tuple[int, int], options: dict[str, int], folder: Path) -> str:
    if nvrtc.library().version < (13, 0) and capability[0] == 12:
        pytest.skip("the limits are for NVRTC 13; version 12 does not join all stores for these GPUs")
    triton = find_spec("triton")
    if triton is None or not triton.submodule_search_locations:
        pytest.skip("triton, which brings a disassembler, is not installed")
    file = folder / "kernel.cubin"
    file.write_bytes(nvrtc.cubin(source, capability, options))
    tool = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


def loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop: from the target of a jump backwards to the jump."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    jumps = [(i, re.search(r"BRA.*(\.L_x_\d+)", text)) for i, text in enumerate(instructions)]
    return [instructions[labels[jump[1]] : i + 1] for i, jump in jumps if jump and labels.get(jump[1], i + 1) <= i]


CAPABILITIES = [(8, 0), (9, 0), (12, 0)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPATH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", ["decode-1-n4-bf16", "decode-4-n4-bf16", "decode-1-c16-bf16", "live-1-bf16"])
def test_machine_code(cache, name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """16-byte loads, nothing spilled, and few enough instructions for each multiplication."""
    source, options = shipped()[name]
    assembly = disassembled(source, capability, options, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", assembly), "registers are spilled"
    assert re.search(r"LDG\.E\S*\.128", assembly), "no 16-byte loads"
    batch = options["BATCH"]
    inner = [body for body in loops(assembly) if sum("FFMA" in text for text in body) >= 8 * batch]
    # While an H200 reads a dense weight of bfloat16, a lane has time for 15.6 instructions; more tokens share them.
    limit = {"decode-1-n4-bf16": 9.0, "decode-4-n4-bf16": 4.2, "decode-1-c16-bf16": 7.2, "live-1-bf16": 4.8}[name]
    cost = min(len(body) / sum("FFMA" in text for text in body) for body in inner)
    assert cost <= limit, f"{cost:.1f} instructions for each multiplication"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_machine_code_of_tiles(cache, capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing spilled, and few enough instructions for each position of a tile."""
    source, options = shipped()["tiles-16"]
    assembly = disassembled(source, capability, options, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", assembly), "registers are spilled"
    assert re.search(r"LDG\.E\S*\.128", assembly), "no 16-byte loads of the weight"
    bodies = loops(assembly)
    tile = max((body for body in bodies if any("HMMA" in text for text in body)), key=len)
    # The loop inside, for what is more than a thread has in flight, does not run for a tile that is half empty.
    more = min((body for body in bodies if sum("STS.U16" in text for text in body)), key=len)
    found = {name: sum(name in text for text in tile) for name in ("HMMA", "STS.U16", "LDS.128", "STS.128", "LDGSTS")}
    # A warp multiplies 32 rows and 64 columns by 16 tokens. The groups that a thread has in flight are written out in a
    # loop, for tiles that are fuller than usual, and behind it.
    assert found["HMMA"] == 16 and found["STS.U16"] == 2 * 8 * options["DEPTH"] and found["LDGSTS"] == 2, found
    assert found["LDS.128"] == 8 + 4 and found["STS.128"] >= 8, found
    # While an H200 reads a dense weight of bfloat16, a lane has time for 15.6 instructions a position; half of that is
    # left for a tile that is multiplied twice as fast.
    positions = options["TILE_ROWS"] * options["TILE_COLUMNS"] / (options["WARPS"] * 32)
    count = len(tile) - len(more)
    assert len(more) < len(tile) and count / positions <= 7.8, f"{count} instructions for {positions:.0f} positions"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", ["sum-fp32", "sum-bf16", "dots-fp32", "dots-bf16"])
def test_machine_code_over_plans(cache, name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """Nothing spilled, shared memory read once for each operand, and few instructions for each multiplication."""
    source, options = shipped()[name]
    assembly = disassembled(source, capability, options, tmp_path)
    assert not re.search(r"\b(LDL|STL)\b", assembly), "registers are spilled"
    assert "LDGSTS" in assembly, "operands go through registers on their way to shared memory"
    if name.startswith("sum"):
        body = min((body for body in loops(assembly) if sum("FFMA" in text for text in body) >= 8), key=len)
        connections = sum("FFMA" in text for text in body) / 4  # of four tokens
        reads, limit = 1.5, {"sum-fp32": 8, "sum-bf16": 12}[name]
    else:
        body = max(loops(assembly), key=lambda body: sum("FFMA" in text for text in body))
        connections = options["TWOS"] * 2
        reads, limit = 2.2, {"dots-fp32": 12, "dots-bf16": 20}[name]
    assert sum("LDS" in text for text in body) <= reads * connections
    assert len(body) / connections <= limit, f"{len(body) / connections:.1f} instructions for each connection"


def test_the_largest_kernels_do_not_spill(cache, tmp_path: Path) -> None:
    for name in ("decode-8-n4-bf16", "decode-8-n4-fp32", "live-4-bf16", "tiles-64"):
        source, options = shipped()[name]
        assert not re.search(r"\b(LDL|STL)\b", disassembled(source, (9, 0), options, tmp_path)), name


def test_waits_for_the_kernel_before(cache, tmp_path: Path) -> None:
    """On Hopper, nothing is read or written before the wait."""
    for name in ("tiles-16", "sum-bf16", "dots-bf16", "reduce-bf16", "live-1-bf16"):
        source, options = shipped()[name]
        before, _, after = disassembled(source, (9, 0), options, tmp_path).partition("ACQBULK")
        assert after and not re.search(r"\b(LDG|STG|LD|ST)\b\.", before) and "PREEXIT" not in before, name
    source, options = shipped()["decode-1-n4-bf16"]
    assembly = disassembled(source, (9, 0), options, tmp_path)
    before, _, after = assembly.partition("ACQBULK")
    assert after and not re.search(r"\b(LDG|STG|LD|ST)\b\.", before) and "PREEXIT" not in before
    assert "UBLKPF" in before, "nothing is prefetched"
    assert ".CONSTANT" not in assembly, "the read-only cache may hold what was there before"
