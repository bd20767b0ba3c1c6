"""The CUDA sources on the CPU again, under ThreadSanitizer: barriers alone order what the threads of a block do.

So it is on a GPU: that the lanes of a warp mostly go together, or meet in a shuffle, promises nothing of their memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpu_on_cpu import (
    COMPILER,
    Programs,
    Variant,
    bucketed_dots,
    bucketed_sum,
    bucketed_variant,
    decode,
    decode_variant,
    dots_variant,
    live,
    live_variants,
    multiply_tiles,
    tile_variants,
)
from offpath.kernels.gpu.buckets import DTYPES
from test_gpu_buckets import Gradient, Problem as Buckets
from test_gpu_cuda import LiveProblem, Problem as Decoded
from test_gpu_formats import KINDS
from test_gpu_tiles import Problem as Tiles

BF16, FLOAT = torch.bfloat16, torch.float32
Run = Callable[[Programs], object]
Edit = tuple[str, str] | None


def _decode(kind: str, dtype: torch.dtype, batch: int, edit: Edit = None, staged: bool = True) -> tuple:
    variant, problem = decode_variant(kind, dtype, batch, staged, edit), Decoded(dtype, batch, True)
    return [variant], lambda programs: decode(programs, variant, problem.packed(kind), problem.x, problem.bias)


def _live(dtype: torch.dtype, batch: int, edit: Edit = None) -> tuple:
    variants, problem = live_variants(dtype, batch, edit), LiveProblem(dtype, batch)
    return variants, lambda programs: live(programs, variants, problem.x, problem.weight, problem.bias)


def _tiles(tokens: int, warps: int, edit: Edit = None) -> tuple:
    variants, problem = tile_variants(tokens, warps, edit), Tiles(tokens, True)
    return variants, lambda programs: multiply_tiles(programs, variants, problem.tiles(), problem.x, problem.bias)


def _sum(dtype: torch.dtype, edit: Edit = None) -> tuple:
    variant, of = bucketed_variant(dtype, edit), Buckets(dtype, True)
    return [variant], lambda programs: bucketed_sum(programs, variant, of.buckets, of.values, of.x, of.bias)


def _dots(dtype: torch.dtype, edit: Edit = None) -> tuple:
    variant, of = dots_variant(dtype, edit), Gradient(dtype, True)
    return [variant], lambda programs: bucketed_dots(programs, variant, of.regions, of.dy, of.x)


KERNELS: dict[str, tuple[list[Variant], Run]] = {
    **{f"decode {kind}": _decode(kind, BF16, 2) for kind in KINDS},
    "decode of float32": _decode("n4", FLOAT, 4),
    "decode, x in global memory": _decode("n4", FLOAT, 2, staged=False),
    "live": _live(BF16, 4),
    "live of float32": _live(FLOAT, 2),
    "tiles of 8 tokens": _tiles(8, 4),
    "tiles of 16 tokens": _tiles(16, 8),
    **{f"sum of {dtype}": _sum(dtype) for dtype in DTYPES},
    **{f"dots of {dtype}": _dots(dtype) for dtype in DTYPES},
}
COPIES = "wait_for_copies();\n        __syncthreads();"
MUTANTS: dict[str, tuple[list[Variant], Run]] = {
    "decode: no barrier after staging": _decode("n4", BF16, 2, ("if (!__syncthreads_or(strange))", "if (!strange)")),
    "live: the counts are not waited for": _live(BF16, 4, ("__syncthreads(); // and", "// and")),
    "live: the list is not waited for": _live(
        BF16, 4, ("            __syncthreads();\n        }\n        for", "        }\n        for")
    ),
    "live: the warps' sums are not waited for": _live(
        BF16, 4, ("        __syncthreads();\n        for (int i", "for (int i")
    ),
    "live: the next sums do not wait": _live(BF16, 4, ("        __syncthreads();\n    }\n}", "    }\n}")),
    "tiles: no barrier before the first one": _tiles(8, 4, ("tokens);\n    __syncthreads();", "tokens);")),
    "tiles: no barrier between them": _tiles(8, 4, (COPIES, "wait_for_copies();")),
    "tiles: the sums are not waited for": _tiles(8, 4, ("    __syncthreads();\n    for (int i", "    for (int i")),
    "tiles: one buffer of x": _tiles(8, 4, ("staged + (next - first) % 2 * X_BYTES", "staged")),
    "tiles: two threads write a place": _tiles(8, 4, ("THREADS * i + self < end", "THREADS * i + self / 2 < end")),
    "sum: no barrier between chunks": _sum(BF16, (COPIES, "wait_for_copies();")),
    "sum: one buffer": _sum(BF16, ("unsigned char *to = staged + chunk % 2 * x_bytes", "unsigned char *to = staged")),
    "dots: no barrier between tokens": _dots(
        BF16, (COPIES, f"if (first_token == 0) {{ {COPIES} }} wait_for_copies();")
    ),
    "dots: one buffer": _dots(
        BF16, ("staged + first_token / TOKENS % 2 * buffer_bytes + threadIdx", "staged + threadIdx")
    ),
}
SHARED_PLACE = _live(BF16, 4, ("((long long)blockIdx.y * tokens + token)", "token"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the CUDA sources on the CPU with")
    variants = [variant for some, _ in (*KERNELS.values(), *MUTANTS.values(), SHARED_PLACE) for variant in some]
    return Programs(tmp_path_factory.mktemp("gpu_races") / "kernels", variants, "races")


@pytest.mark.parametrize("name", KERNELS)
def test_no_race(programs: Programs, name: str) -> None:
    KERNELS[name][1](programs)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_race_is_seen(programs: Programs, name: str) -> None:
    # What two threads write at once may be read as an address before the race is reported.
    with pytest.raises(RuntimeError, match=r"data race|ThreadSanitizer: SEGV"):
        MUTANTS[name][1](programs)


def test_blocks_that_write_to_one_place_are_seen(programs: Programs) -> None:
    with pytest.raises(RuntimeError, match="where another block has written"):
        SHARED_PLACE[1](programs)
