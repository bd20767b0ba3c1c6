"""What selections and encoders of sparse rows are tested on: scores of every kind, and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import Operands
from problems import Draw
from row_cases import LAYOUTS

Scores = Callable[[int, int, torch.Generator], Tensor]


def _gaussian(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, n, generator=generator, dtype=torch.float64)


def _one_of(*choices: float) -> Scores:
    def draw(rows: int, n: int, generator: torch.Generator) -> Tensor:
        return torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), (rows, n), generator=generator)]

    return draw


def _with(share: float, *choices: float) -> Scores:
    def draw(rows: int, n: int, generator: torch.Generator) -> Tensor:
        special = torch.rand(rows, n, generator=generator) < share
        return torch.where(special, _one_of(*choices)(rows, n, generator), _gaussian(rows, n, generator))

    return draw


INF, NAN = float("inf"), float("nan")

# What stresses a running threshold and a buffer of candidates: order, ties, and what compares unlike a number.
SCORES: dict[str, Scores] = {
    "gaussian": _gaussian,
    "many ties": _one_of(0.0, 1.0, 2.0),
    "ascending": lambda rows, n, generator: _gaussian(rows, n, generator).sort(1).values,
    "descending": lambda rows, n, generator: _gaussian(rows, n, generator).sort(1, descending=True).values,
    "ascending, in steps": lambda rows, n, generator: (torch.arange(n).double() // 7).expand(rows, n),
    "all equal": lambda rows, n, generator: torch.full((rows, n), -1.5, dtype=torch.float64),
    "largest in the last places": lambda rows, n, generator: (
        _gaussian(rows, n, generator) + 8.0 * (torch.arange(n) > n - 9)
    ),
    "all negative": lambda rows, n, generator: -_gaussian(rows, n, generator).abs() - 1,
    "mostly zero": lambda rows, n, generator: _gaussian(rows, n, generator).sub(1.5).relu(),
    "zeros of both signs": _one_of(0.0, -0.0, -0.0, -1.0),
    "some NaN": _with(0.1, NAN),
    "some NaN and infinities": _with(0.3, NAN, INF, -INF),
    "all NaN": _one_of(NAN),
    "all -inf": _one_of(-INF),
    "mostly -inf": _with(0.95, -INF),
    "numbers among +inf": _with(0.9, INF),
    "extremes of float32": _one_of(3.0e38, -3.0e38, 1.2e-38, -1.2e-38, 0.0),
}


def scores(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A table of scores [rows, n]; "subnormal" counts in the smallest number of the dtype."""
    generator = torch.Generator().manual_seed(shape[0] * 7919 + shape[1])
    if kind == "subnormal":
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return torch.randint(-5, 6, shape, generator=generator).to(dtype) * smallest
    return SCORES[kind](*shape, generator).to(dtype).contiguous()


EVERY_KIND = (*SCORES, "subnormal")
SMALL_SHAPES = ((0, 5), (3, 0), (1, 1), *((2, n) for n in range(1, 34)))
SHAPES = ((3, 64), (65, 17), (2, 1000), (1, 4099))


def ks(most: int) -> list[int]:
    """How many to choose of `most`: none, few, half, all, and the widths of vectors between."""
    return sorted({k for k in (0, 1, 8, 17, 32, most // 2, most - 1, most) if 0 <= k <= most})


@dataclass(frozen=True, eq=False)
class EncodeProblem:
    """The sizes of an encoder, and how its operands lie in memory."""

    rows: int
    latents: int
    width: int
    k: int
    bias: bool = True
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        bias = "bias" if self.bias else "no bias"
        return f"{self.rows} rows of {self.width}, {self.k} of {self.latents} latents, {bias}, {self.layout}"

    def draw(self, draw: Draw) -> Operands:
        lay = LAYOUTS[self.layout]
        operands = {"x": lay(draw, self.rows, self.width), "weight": lay(draw, self.latents, self.width)}
        return operands | ({"bias": draw((self.latents,))} if self.bias else {})


ENCODE_PROBLEMS = (
    *(EncodeProblem(3, 40, width, 4, bias=width % 2 == 0) for width in (*range(1, 34), 64 + 3, 200)),
    *(EncodeProblem(2, latents, 8, min(latents, 3)) for latents in (*range(1, 34), 257)),
    *(EncodeProblem(rows, 100, 9, 7) for rows in (0, 1, 63, 64, 65, 200, 300)),
    *(EncodeProblem(5, 50, 6, k, bias=False) for k in (0, 1, 49, 50)),
    *(EncodeProblem(66, 70, 12, 5, layout=layout) for layout in list(LAYOUTS)[1:]),
    EncodeProblem(4, 0, 6, 0),
    EncodeProblem(4, 30, 0, 3),
    EncodeProblem(66, 1200, 16, 32),
    EncodeProblem(3, 5000, 4, 300, bias=False),
)


def signs(seed: int, dtype: torch.dtype) -> Draw:
    """-1, 0 and 1: the sum of 200 products is exact in bfloat16 too, and most scores have ties."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randint(-1, 2, shape, generator=generator).to(dtype)
