"""Memory that is kept once it is freed: a block costs no new pages where others of its size have gone before."""

import platform
import subprocess
import sys

import pytest

BLOCK_BYTES = 64 << 20
# The fewest new pages that a block can have: where the system hands out those of 2 MiB unasked.
HUGE_PAGES = BLOCK_BYTES >> 21
# Some blocks need a place of their own: one that is to be aligned wants more than its size, and does not fit into the
# hole of another while the C library caches the few bytes before it (at most seven such pieces of a size, so that by
# far the most of this many blocks find a hole). Which blocks those are depends on where the heap begins.
BLOCKS = 24
NEW_PAGES_OF_MOST_BLOCKS = f"""
import resource
import statistics
import sys
import torch
import offpath.cost

if sys.argv[1] == "kept":
    assert offpath.cost.keep_freed_memory() and offpath.cost.keep_freed_memory()
new_pages = []
for block in range({BLOCKS}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones({BLOCK_BYTES}, dtype=torch.uint8)
    new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median_low(new_pages))
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")


def new_pages_of_most_blocks(how: str) -> int:
    command = [sys.executable, "-c", NEW_PAGES_OF_MOST_BLOCKS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_block_takes_the_pages_of_those_before_it() -> None:
    assert new_pages_of_most_blocks("kept") < HUGE_PAGES


def test_by_default_it_gets_new_ones() -> None:
    assert new_pages_of_most_blocks("by default") >= HUGE_PAGES
