"""Mistakes that a sanitizer has to find, so that its silence means something: python -m gpu.planted TOOL."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def beyond_the_end(target, count):
    """Writes one element too many."""
    place = tl.arange(0, 32)
    tl.store(target + place, place, mask=place <= count)


@triton.jit
def without_a_barrier(target):
    """All warps write to one place of shared memory, and read it."""
    place = tl.arange(0, 128)
    read = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 spot; st.volatile.shared.b32 [spot], $1; ld.volatile.shared.b32 $0, [spot]; }",
        "=r,r",
        [place],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(target + place, read)


if __name__ == "__main__":
    if sys.argv[1] == "memcheck":
        beyond_the_end[(1,)](torch.empty(16, dtype=torch.int32, device="cuda"), 16)
    else:
        without_a_barrier[(1,)](torch.empty(128, dtype=torch.int32, device="cuda"), num_warps=4)
    torch.cuda.synchronize()
