"""Times of writing a packed weight out: as a share of what a copy moves, and with a dense product behind it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.check import exactly
from gpu.draws import dense, numbers, pattern
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.timing import Effort, copies
from measure import Timing
from offpath.kernels.gpu.expand import Bitmap, bitmap, compress, expand
from verdicts import Figure

BANDWIDTH, PRODUCT = "Weight written out, beside a copy of as many bytes", "Weight written out + cuBLAS"
BANDWIDTH_BAR, PRODUCT_BAR = 0.75, 1 / 1.1  # of issue 7, for an H200: 75 % of a copy, within 10 % at 4096 tokens
# cudaMemcpy does not always reach what a kernel does that reads and writes: the copy is the faster one of the two.
COPY, PASS = "copy", "copy by a kernel"
SCALED = "a copy of as many bytes"
EXPAND, COMPRESS, DENSE, OURS = "expand", "compress", "dense bf16", "expand + cuBLAS"
COPIED_BYTES = 2**30  # read, and as many written: what the card can do
SHAPES = ((8192, 8192), (4096, 4096), (4096, 14336))
SPARSITIES = (0.5, 0.7, 0.9)
TOKENS = (4096, 512, 1024, 2048, 8192, 16384)
BARRED_TOKENS = 4096


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    shapes, sparsities, tokens = (SHAPES, SPARSITIES, TOKENS)
    if quick:
        shapes, sparsities, tokens = ((1024, 1024),), (0.5,), (512,)
    for shape in shapes:
        for sparsity in sparsities:
            barred = shape == SHAPES[0] and sparsity == SPARSITIES[0]
            row = f"{shape[0]} x {shape[1]} at {sparsity:.0%}"
            wanted = tuple(
                Wanted(
                    Figure(BANDWIDTH, row, side, BANDWIDTH_BAR if barred and side == EXPAND else None),
                    side,
                    (SCALED,),
                )
                for side in (EXPAND, COMPRESS)
            )
            yield Job(wanted, ("bitmap", "expand", "compress"), partial(_bandwidth, shape, sparsity, effort, device))
    for shape in shapes[:2]:
        for count in tokens:
            bar = PRODUCT_BAR if shape == SHAPES[0] and count == BARRED_TOKENS else None
            figure = Figure(PRODUCT, f"{shape[0]} x {shape[1]} at 50%", f"{count} tokens", bar)
            measure = partial(_product, shape, count, effort, device)
            yield Job((Wanted(figure, OURS, (DENSE,)),), ("bitmap", "expand"), measure)


def _draw(shape: tuple[int, int], sparsity: float, device: torch.device) -> tuple[Bitmap, Tensor, Tensor]:
    """The bits, the values, and the weight as it has to come out; checked."""
    crow_indices, col_indices = pattern(*shape, 1 - sparsity, device)
    values = numbers(col_indices.numel(), dtype=torch.bfloat16, device=device)
    prepared = bitmap(crow_indices, col_indices, shape[1])
    weight = dense(crow_indices, col_indices, values, shape[1])
    require("the weight written out", expand(prepared, values), exactly(weight))
    require("the weight read back", compress(prepared, weight), exactly(values))
    return prepared, values, weight


def _bandwidth(shape: tuple[int, int], sparsity: float, effort: Effort, device: torch.device) -> Raced:
    """The copy's time is scaled to the bytes that each of the others reads and writes."""
    prepared, values, weight = _draw(shape, sparsity, device)
    packed_bytes = prepared.bytes + values.nbytes
    source = torch.randn(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    sides = Sides({COPY: [partial(target.copy_, source)], PASS: [partial(torch.neg, source, out=target)]})
    sides.calls[EXPAND] = [partial(expand, *one) for one in copies((prepared, values), packed_bytes)]
    sides.calls[COMPRESS] = [
        partial(compress, *one) for one in copies((prepared, weight), prepared.bytes + weight.nbytes)
    ]
    raced = sides.race(effort)
    copied = min((raced.times[name] for name in (COPY, PASS)), key=lambda timing: timing.median_seconds)
    share = (packed_bytes + weight.nbytes) / (2 * COPIED_BYTES)  # one of them is read, the other one written
    raced.times[SCALED] = Timing(tuple(share * seconds for seconds in copied.seconds))
    return raced


def _product(shape: tuple[int, int], tokens: int, effort: Effort, device: torch.device) -> Raced:
    prepared, values, weight = _draw(shape, 0.5, device)
    x = numbers(tokens, shape[1], dtype=torch.bfloat16, device=device)
    dense_calls = [partial(torch.mm, x, one.t()) for one in copies(weight, weight.nbytes)]
    ours = [
        lambda one=one: torch.mm(x, expand(*one).t())
        for one in copies((prepared, values), prepared.bytes + values.nbytes)
    ]
    return Sides({DENSE: dense_calls, OURS: ours}).race(effort)
