"""Times of a few tokens times a sparse weight, as in decoding: packed weights beside the best dense product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu.check import sums
from gpu.draws import dense, numbers, pattern
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.rivals import csr, two_of_four
from gpu.timing import Call, Effort, copies, race
from offpath.kernels.gpu import formats
from offpath.kernels.gpu.decode import decode
from verdicts import Figure

# Of issue 7, for an H200 and one token.
BARS = {0.5: 1.15, 0.6: 1.4, 0.7: 1.8, 0.8: 2.5, 0.9: 3.8}
BARRED_SHAPE = (8192, 8192)
SHAPES = (BARRED_SHAPE, (4096, 4096), (4096, 14336))
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOKENS = (1, 2, 4, 8)
CSR, TWO_OF_FOUR = "torch.sparse CSR", "torch 2:4"
DENSE_FORMS = ("dense bf16, out x in", "dense bf16, in x out", "dense bf16, vector")
KINDS: tuple[formats.Kind, ...] = ("n4", "c16")
Shape = tuple[int, int]


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    shapes, sparsities, tokens = ((1024, 1024),), (0.7,), (1,)
    if not quick:
        shapes, sparsities, tokens = SHAPES, SPARSITIES, TOKENS
    for count in tokens:
        for shape in shapes:
            for sparsity in sparsities:
                bar = BARS.get(sparsity) if (shape, count) == (BARRED_SHAPE, 1) else None
                figure = Figure(section(count), words(shape), f"{sparsity:.0%}", bar)
                measure = partial(_decode, shape, sparsity, count, effort, device)
                # Either format may be the faster one; what is timed is the one that `pack` chooses.
                yield Job((Wanted(figure, "offpath", DENSE_FORMS),), ("decode_n4", "decode_c16"), measure)
    for sparsity in sparsities:  # as in a network, where another kernel stands between any two products
        figure = Figure(section(1), f"{words(shapes[0])}, a ReLU after each", f"{sparsity:.0%}")
        measure = partial(_decode, shapes[0], sparsity, 1, effort, device, relu=True)
        yield Job((Wanted(figure, "offpath", DENSE_FORMS),), ("decode_n4", "decode_c16"), measure)
    for shape in shapes[:1]:
        for count in tokens:
            figure = Figure("torch 2:4 over dense bf16", words(shape), f"{count} tokens")
            measure = partial(_two_of_four, shape, count, effort, device)
            yield Job((Wanted(figure, TWO_OF_FOUR, DENSE_FORMS),), (), measure)


def section(tokens: int) -> str:
    return f"Decoding, {tokens} token{'s' if tokens > 1 else ''}, over the best dense bf16"


def words(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _decode(
    shape: Shape, sparsity: float, tokens: int, effort: Effort, device: torch.device, relu: bool = False
) -> Raced:
    crow_indices, col_indices = pattern(*shape, 1 - sparsity, device)
    values = numbers(col_indices.numel(), dtype=torch.bfloat16, device=device)
    weight = dense(crow_indices, col_indices, values, shape[1])
    x = numbers(tokens, shape[1], dtype=torch.bfloat16, device=device)
    chosen = formats.pack(crow_indices, col_indices, values, shape[1]).kind
    packed = {kind: formats.pack(crow_indices, col_indices, values, shape[1], kind) for kind in KINDS}
    exact, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    right = sums(exact, size, crow_indices.diff()[None, :], torch.bfloat16)
    sides = Sides()
    for kind, one in packed.items():
        require(f"the product with {kind}", decode(one, x), right)
        name = "offpath" if kind == chosen else f"offpath, {kind}"
        sides.calls[name] = [partial(decode, each, x) for each in copies(one, one.n_bytes)]
    form = best_dense(shape, tokens, effort, device)
    sides.calls[form] = dense_calls(form, copies(weight, weight.nbytes), x)
    if relu:
        sides.calls = {name: [_then_relu(call) for call in calls] for name, calls in sides.calls.items()}
    raced = sides.race(effort)
    if tokens == 1 and shape == BARRED_SHAPE and not relu:
        matrix = Sides({form: sides.calls[form]}, raced.refused)
        matrix.offer(CSR, lambda: [partial(torch.mv, csr(crow_indices, col_indices, values, shape[1]), x[0])])
        raced.times.update(
            {name: time for name, time in matrix.race(effort, graphs=False).times.items() if name == CSR}
        )
    return raced


def _then_relu(call: Call) -> Call:
    return lambda: torch.relu_(call())


def _two_of_four(shape: Shape, tokens: int, effort: Effort, device: torch.device) -> Raced:
    weight = numbers(*shape, dtype=torch.bfloat16, device=device)
    x = numbers(tokens, shape[1], dtype=torch.bfloat16, device=device)
    form = best_dense(shape, tokens, effort, device)
    sides = Sides({form: dense_calls(form, copies(weight, weight.nbytes), x)})

    def ours() -> list[Call]:
        halves = [two_of_four(one) for one in copies(weight, weight.nbytes // 2)]
        return [partial(functional.linear, x, half) for half in halves]

    sides.offer(TWO_OF_FOUR, ours)
    return sides.race(effort)


def dense_calls(form: str, weights: list[Tensor], x: Tensor) -> list[Call]:
    """The dense product of `x` with each of the weights [out, in], as `form` wants them to lie."""
    if form == DENSE_FORMS[0]:
        return [partial(functional.linear, x, weight) for weight in weights]
    if form == DENSE_FORMS[1]:
        return [partial(torch.mm, x, weight.t().contiguous()) for weight in weights]
    return [partial(torch.mv, weight, x[0]) for weight in weights]


@cache
def best_dense(shape: Shape, tokens: int, effort: Effort, device: torch.device) -> str:
    """The fastest dense form: what sparse ones have to beat."""
    weights = copies(numbers(*shape, dtype=torch.bfloat16, device=device), 2 * shape[0] * shape[1])
    x = numbers(tokens, shape[1], dtype=torch.bfloat16, device=device)
    forms = DENSE_FORMS if tokens == 1 else DENSE_FORMS[:2]
    times, _ = race({form: dense_calls(form, weights, x) for form in forms}, effort)
    return min(times, key=lambda form: times[form].median_seconds)
