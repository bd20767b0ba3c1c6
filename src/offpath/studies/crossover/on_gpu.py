"""How a contender is timed on a GPU: over copies that no cache still holds, and without the time of launches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.cost.bounds import expected
from offpath.cost.crossover import SEMI_STRUCTURED, TF32, Contender
from offpath.kernels.precision import multiplied_in_tf32

# TF32 keeps 10 bits of a mantissa: operands are off by up to half of the last of them.
TF32_UNIT = 2.0**-11
# Copies of the weights, together: so many times the second-level cache; of small layers not more than so many.
CACHES, MOST_COPIES = 2, 32


def synchronized_clock() -> float:
    """Seconds, once the device has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight it takes until the first one has left the second-level cache."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(max(2, math.ceil(CACHES * cache_bytes / max(weight_bytes, 1))), MOST_COPIES)


def in_turns(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """One function that makes all `calls`, and how many they are."""

    def run() -> None:
        for call in calls:
            call()

    return run, len(calls)


def captured(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """The same as one CUDA graph: what is timed is the device, and not the way through Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # whatever is prepared in a first call cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: object = kept) -> None:
        graph.replay()

    return replay, len(calls)


def in_tf32(dense: Contender) -> Contender:
    """The dense product as torch computes it where float32 may be rounded to TF32."""

    def run() -> Sequence[Tensor]:
        with multiplied_in_tf32():
            return dense.run()

    rounded = tuple(right.with_operands_rounded(TF32_UNIT) for right in dense.expected)
    return replace(dense, method=TF32, way=f"{dense.way}, TF32", run=run, expected=rounded)


def offers_two_of_four(weight: Tensor, sparsity: float) -> bool:
    """Whether torch's 2:4 weights stand beside this one: of half the connections, on tensor cores, in whole tiles."""
    whole = weight.shape[0] % 64 == 0 and weight.shape[1] % 64 == 0
    return weight.is_cuda and weight.dtype is torch.bfloat16 and whole and abs(sparsity - 0.5) < 0.01


def two_of_four(weight: Tensor, bias: Tensor, x: Tensor) -> Contender:
    """`nn.Linear` with the two largest of every four neighbours of `weight`, as torch multiplies them."""
    fours = weight.view(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, dim=1).indices, True)
    pruned = (fours * kept).view(weight.shape)
    compressed: list[Tensor] = []

    def run() -> tuple[Tensor]:
        if not compressed:  # it refuses where a device or a build has no such product
            compressed.append(torch.sparse.to_sparse_semi_structured(pruned))
        with torch.no_grad():
            return (linear(x, compressed[0], bias),)

    size = linear(x.float().abs(), pruned.float().abs(), bias.float().abs())
    exact = linear(x.double(), pruned.double(), bias.double())
    right = expected(exact, size, torch.tensor(weight.shape[1] // 2, device=x.device), x.dtype)
    return Contender(SEMI_STRUCTURED, "2 of 4", run, (right,), (RuntimeError,))
