"""Times of one to four tokens, many of whose inputs are zero, times a dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpu.check import sums
from gpu.decode import DENSE_FORMS, best_dense, dense_calls, words
from gpu.draws import numbers
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.timing import Effort, copies
from offpath.kernels.gpu.live import live_matmul
from verdicts import Figure

BARS = {0.5: 1.5}  # of issue 7, for an H200 and one token
Shape = tuple[int, int]  # outputs, inputs
BARRED_SHAPE = (8192, 8192)
SHAPES = (BARRED_SHAPE, (4096, 4096), (4096, 14336))
DEAD = (0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
TOKENS = (1, 2, 4)


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    shapes, dead, tokens = (SHAPES, DEAD, TOKENS) if not quick else (((1024, 1024),), (0.5,), (1,))
    for count in tokens:
        for shape in shapes:
            for share in dead:
                bar = BARS.get(share) if (shape, count) == (BARRED_SHAPE, 1) else None
                figure = Figure(section(count), words(shape), f"{share:.0%} zero", bar)
                measure = partial(_live, shape, share, count, effort, device)
                yield Job((Wanted(figure, "offpath", DENSE_FORMS),), ("live",), measure)


def section(tokens: int) -> str:
    each = "" if tokens == 1 else ", zero in each at other places"
    return f"Zero inputs, {tokens} token{'s' if tokens > 1 else ''}{each}, over the best dense bf16"


def _live(shape: Shape, dead: float, tokens: int, effort: Effort, device: torch.device) -> Raced:
    n_outputs, n_inputs = shape
    x = numbers(tokens, n_inputs, dtype=torch.bfloat16, device=device)
    x *= torch.rand(tokens, n_inputs, device=device) >= dead
    weight = numbers(n_outputs, n_inputs, dtype=torch.bfloat16, device=device)
    by_input = weight.t().contiguous()
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    right = sums(exact, size, (x != 0).sum(1, keepdim=True), torch.bfloat16)
    require("the product", live_matmul(x, by_input), right)
    form = best_dense(shape, tokens, effort, device)
    # As many copies as hold more than the caches when only the live rows are read.
    read_bytes = int((x != 0).any(0).sum()) * n_outputs * weight.element_size()
    sides = Sides({"offpath": [partial(live_matmul, x, one) for one in copies(by_input, read_bytes)]})
    sides.calls[form] = dense_calls(form, copies(weight, weight.nbytes), x)
    return sides.race(effort)
