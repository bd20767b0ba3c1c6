"""Cases of the products of a few tokens: with a packed sparse weight, and of sparse activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gpu.check import Case, exactly, sums
from gpu.draws import dense, numbers, pattern, starts
from offpath.cost.bounds import Expected
from offpath.kernels.gpu import formats
from offpath.kernels.gpu.decode import decode
from offpath.kernels.gpu.live import live_matmul

Shape = tuple[int, int, float]  # rows, columns, density
# At 1 %, gaps are longer than n4's four bits hold; so many columns do not fit into shared memory.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((1, 1, 1.0), (5, 33, 0.5), (40, 300, 0.01), (3, 40, 0.0)),
    "full": ((1, 1, 1.0), (65, 33, 0.5), (40, 64, 0.0), (24, 96, 1.0), (300, 1000, 0.01), (256, 4096, 0.3),
             (2000, 512, 0.1), (48, 65536, 0.05)),
}  # fmt: skip
TOKENS = {"small": (1, 3), "full": (1, 2, 3, 4, 8)}


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    """None in Triton's interpreter: these are CUDA kernels."""
    for shape in SHAPES.get(scale, ()):
        for dtype in (torch.float32, torch.bfloat16):
            crow_indices, col_indices = pattern(*shape, device)
            for kind in ("n4", "c16"):
                yield from _packed(crow_indices, col_indices, shape, kind, dtype, scale)


def _packed(
    crow_indices: Tensor, col_indices: Tensor, shape: Shape, kind: formats.Kind, dtype: torch.dtype, scale: str
) -> Iterator[Case]:
    rows, columns, density = shape
    draw = partial(numbers, dtype=dtype, device=col_indices.device)
    values = draw(col_indices.numel())
    packed = formats.pack(crow_indices, col_indices, values, columns, kind)
    matrix = dense(crow_indices, col_indices, values, columns).double()
    dead = torch.bincount(col_indices, minlength=columns) == 0
    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {columns} at {1 - density:.0%} sparsity"
    yield Case(
        f"pack_{kind}",
        name,
        lambda: formats.unpack(formats.pack(crow_indices, col_indices, values, columns, kind)),
        lambda: (exactly(crow_indices), exactly(col_indices), exactly(values)),
        captured=False,
    )
    for tokens in TOKENS[scale]:
        x, bias = draw(tokens, columns), draw(rows)
        used = x.double()
        x[:, dead] = torch.nan  # no row has a connection there
        case = Case(
            f"decode_{kind}",
            f"{name}, {tokens} tokens",
            partial(decode, packed, x, bias),
            partial(_right, matrix, used, bias, crow_indices, dtype),
            (x, bias),
        )
        yield case
        if tokens == 1:
            # Behind a copy, which is no kernel: one that may begin before its predecessor ends has to wait for it, too.
            yield replace(case, name=f"{case.name}, copied", call=partial(_of_a_copy, packed, x, bias))


def _of_a_copy(packed: formats.Packed, x: Tensor, bias: Tensor) -> Tensor:
    return decode(packed, x.clone(), bias)


def _right(matrix: Tensor, x: Tensor, bias: Tensor, crow_indices: Tensor, dtype: torch.dtype) -> tuple[Expected, ...]:
    exact = x @ matrix.t() + bias.double()
    size = x.abs() @ matrix.abs().t() + bias.double().abs()
    return (sums(exact, size, crow_indices.diff()[None, :] + 1, dtype),)


# n_inputs, n_outputs (a multiple of 16 bytes), live share of the inputs
LIVE_SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((1, 8, 1.0), (70, 40, 0.3), (33, 264, 0.0)),
    "full": ((1, 8, 1.0), (70, 40, 0.3), (33, 264, 0.0), (1000, 520, 0.5), (4096, 1024, 0.1), (300, 8192, 1.0)),
}


def live_cases(scale: str, device: torch.device) -> Iterator[Case]:
    """Sparse activations; rows of the weight that no token uses hold NaN."""
    for n_inputs, n_outputs, share in LIVE_SHAPES.get(scale, ()):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 2, 3, 4):
                draw = partial(numbers, dtype=dtype, device=device)
                x, weight, bias = draw(tokens, n_inputs), draw(n_inputs, n_outputs), draw(n_outputs)
                x *= torch.rand(tokens, n_inputs, device=device) < share
                used, exact = (x != 0).any(0), weight.double()
                weight[~used] = torch.nan
                name = (
                    f"{str(dtype).removeprefix('torch.')}, {n_inputs} x {n_outputs}, {tokens} tokens, {share:.0%} live"
                )
                # A replay has to follow what is live then: the tokens change places, each input stays as it is.
                yield Case(
                    "live",
                    name,
                    partial(live_matmul, x, weight, bias),
                    partial(_right, exact.t(), x.clone().double(), bias, starts(used.sum().expand(n_outputs)), dtype),
                    (x, bias),
                )
