"""The tables that every test of sparse rows reads: what sums over entries, what selects them, and on which input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import Tensor

from cases import Operands
from offpath import kernels, pattern as patterns
from offpath.kernels.row_products import RowProducts
from offpath.pattern import Pattern
from problems import Draw

# The fields of `RowProducts` that each native variant computes itself; the rest is still the shared definition.
NATIVE = frozenset(field.name for field in fields(RowProducts)) - {"counts", "written_out", "dense_dots"}
every_backend = pytest.mark.parametrize("backend", list(kernels.backends().values()), ids=lambda b: b.name)


def _sparse_weight(columns: int, width: int) -> Pattern:
    """Connections of places to outputs: about a third, with places that have none and places that have all."""
    mask = torch.rand(columns, width, generator=torch.Generator().manual_seed(columns * 7919 + width)) < 0.35
    mask[1::5] = False
    mask[3::7] = True
    return patterns.from_mask(mask)


@dataclass(frozen=True, eq=False)
class RowProblem:
    """Where the entries of a batch are, and the width of the matrices; named by the condition that it tests."""

    name: str
    crow_indices: Tensor
    indices: Tensor
    columns: int
    width: int
    weight: Pattern = field(init=False)  # a sparse one, of this many columns and this width

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _sparse_weight(self.columns, self.width))

    @property
    def rows(self) -> int:
        return self.crow_indices.shape[0] - 1


@dataclass(frozen=True, eq=False)
class RowProduct:
    """One product: how to draw its operands, how to ask for it, and how many terms each output sums."""

    name: str
    field: str
    draw: Callable[[RowProblem, Draw], Operands]
    run: Callable[[RowProducts, RowProblem, Operands], Tensor]
    terms: Callable[[RowProblem], Tensor]


def _slice(draw: Draw, rows: int, columns: int) -> Tensor:
    return draw((rows + 2, columns + 3))[1:-1, 1:-2]


# How a caller's matrix may lie in memory; "one number" is what the backward pass of `sum()` hands over.
LAYOUTS: dict[str, Callable[[Draw, int, int], Tensor]] = {
    "contiguous": lambda draw, rows, columns: draw((rows, columns)),
    "transposed": lambda draw, rows, columns: draw((columns, rows)).t(),
    "a slice": _slice,
    "every other": lambda draw, rows, columns: draw((2 * rows, 2 * columns))[::2, ::2],
    "one row repeated": lambda draw, rows, columns: draw((1, columns)).expand(rows, columns),
    "one number": lambda draw, rows, columns: draw((1, 1)).expand(rows, columns),
}


def _matmul(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    return rows.matmul(p.crow_indices, p.indices, operands["values"], operands["weight"])


def _dots(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    return rows.dots(p.crow_indices, p.indices, operands["dy"], operands["weight"])


def _weight_gradient(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    return rows.weight_gradient(p.crow_indices, p.indices, operands["values"], operands["dy"], p.columns)


def _add_weight_gradient(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    buffer = operands["buffer"].clone()
    rows.add_weight_gradient(p.crow_indices, p.indices, operands["values"], operands["dy"], buffer)
    return buffer


def _written_out(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    return rows.written_out(p.crow_indices, p.indices, operands["values"], p.columns)


def _dense_dots(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    return rows.dense_dots(p.crow_indices, p.indices, operands["dy"], operands["weight"])


def _weight_values(p: RowProblem) -> tuple[int]:
    return (p.weight.nnz,)


def _sparse_matmul(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    weight = p.weight
    return rows.sparse_matmul(
        p.crow_indices,
        p.indices,
        operands["values"],
        weight.crow_indices,
        weight.col_indices,
        operands["w_values"],
        p.width,
    )


def _sparse_dots(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    weight = p.weight
    return rows.sparse_dots(
        p.crow_indices, p.indices, operands["dy"], weight.crow_indices, weight.col_indices, operands["w_values"]
    )


def _sparse_weight_gradient(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    weight = p.weight
    return rows.sparse_weight_gradient(
        p.crow_indices, p.indices, operands["values"], operands["dy"], weight.crow_indices, weight.col_indices
    )


def _entries_of_columns(p: RowProblem) -> Tensor:
    return torch.bincount(p.indices, minlength=p.columns)[:, None]


def _entries_of_places(p: RowProblem) -> Tensor:
    rows = torch.arange(p.rows).repeat_interleave(p.crow_indices.diff())
    return torch.bincount(rows * p.columns + p.indices, minlength=p.rows * p.columns).view(p.rows, p.columns)


def _products(layout: str) -> tuple[RowProduct, ...]:
    lay = LAYOUTS[layout]
    return (
        RowProduct(
            f"matmul, weight {layout}",
            "matmul",
            lambda p, draw: {"values": draw(p.indices.shape), "weight": lay(draw, p.columns, p.width)},
            _matmul,
            lambda p: p.crow_indices.diff()[:, None],
        ),
        RowProduct(
            f"dots, dy {layout}",
            "dots",
            lambda p, draw: {"dy": lay(draw, p.rows, p.width), "weight": draw((p.columns, p.width))},
            _dots,
            lambda p: torch.tensor(p.width),
        ),
        RowProduct(
            f"dots, weight {layout}",
            "dots",
            lambda p, draw: {"dy": draw((p.rows, p.width)), "weight": lay(draw, p.columns, p.width)},
            _dots,
            lambda p: torch.tensor(p.width),
        ),
        RowProduct(
            f"dense dots, dy and weight {layout}",
            "dense_dots",
            lambda p, draw: {"dy": lay(draw, p.rows, p.width), "weight": lay(draw, p.columns, p.width)},
            _dense_dots,
            lambda p: torch.tensor(p.width),
        ),
        RowProduct(
            f"weight gradient, dy {layout}",
            "weight_gradient",
            lambda p, draw: {"values": draw(p.indices.shape), "dy": lay(draw, p.rows, p.width)},
            _weight_gradient,
            _entries_of_columns,
        ),
        RowProduct(
            f"weight gradient added, dy {layout}",
            "add_weight_gradient",
            lambda p, draw: {
                "values": draw(p.indices.shape),
                "dy": lay(draw, p.rows, p.width),
                "buffer": draw((p.columns, p.width)),
            },
            _add_weight_gradient,
            lambda p: _entries_of_columns(p) + 1,
        ),
        RowProduct(
            f"sparse dots, dy {layout}",
            "sparse_dots",
            lambda p, draw: {"dy": lay(draw, p.rows, p.width), "w_values": draw(_weight_values(p))},
            _sparse_dots,
            lambda p: torch.tensor(p.width),
        ),
        RowProduct(
            f"sparse weight gradient, dy {layout}",
            "sparse_weight_gradient",
            lambda p, draw: {"values": draw(p.indices.shape), "dy": lay(draw, p.rows, p.width)},
            _sparse_weight_gradient,
            lambda p: _entries_of_columns(p)[p.weight.row_indices().long(), 0],
        ),
    )


PRODUCTS = (
    RowProduct(
        "written out",
        "written_out",
        lambda p, draw: {"values": draw(p.indices.shape)},
        _written_out,
        _entries_of_places,
    ),
    *_products("contiguous"),
    RowProduct(
        "sparse matmul",
        "sparse_matmul",
        lambda p, draw: {"values": draw(p.indices.shape), "w_values": draw(_weight_values(p))},
        _sparse_matmul,
        lambda p: p.crow_indices.diff()[:, None],
    ),
)
PRODUCTS_OF_VIEWS = tuple(product for layout in list(LAYOUTS)[1:] for product in _products(layout))


def _distinct(counts: Sequence[int], columns: int, generator: torch.Generator) -> Tensor:
    rows = [torch.randperm(columns, generator=generator)[:count].sort().values for count in counts]
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows])


def _anywhere(counts: Sequence[int], columns: int, generator: torch.Generator) -> Tensor:
    """In any order, and several times in a row."""
    return torch.randint(max(columns, 1), (sum(counts),), generator=generator)


def _zipf(counts: Sequence[int], columns: int, generator: torch.Generator) -> Tensor:
    """Column i is drawn in proportion to 1 / (i + 1): few are hot, many are never named."""
    return torch.multinomial(1 / torch.arange(1, columns + 1), sum(counts), replacement=True, generator=generator)


def _last(counts: Sequence[int], columns: int, generator: torch.Generator) -> Tensor:
    return torch.full((sum(counts),), columns - 1)


def _problem(name: str, counts: Sequence[int], columns: int, width: int, place=_distinct) -> RowProblem:
    indices = place(counts, columns, torch.Generator().manual_seed(len(counts) * 7919 + columns)).int()
    crow_indices = torch.tensor([0, *counts]).cumsum(0).int()
    return RowProblem(name, crow_indices, indices, columns, width)


# From 1 to twice the widest vector (16 lanes of float32), then past the strips that a kernel may unroll to.
WIDTHS = tuple(_problem(f"width {w}", [3] * 7, 11, w) for w in (*range(1, 34), 64 + 3, 200))

PROBLEMS = (
    _problem("one entry", [1], 1, 5),
    _problem("one row", [9], 40, 9),
    _problem("one column", [1] * 9, 1, 9),
    _problem("one column, many times in a row", [5, 0, 3, 1], 1, 9, _last),
    _problem("no entries", [0] * 6, 7, 9),
    _problem("no rows", [], 7, 9),
    _problem("no columns", [0] * 4, 0, 9),
    _problem("no width", [2] * 4, 7, 0),
    _problem("k = n", [21] * 19, 21, 20),
    _problem("only the first row", [7, 0, 0, 0], 21, 20),
    _problem("only the last row", [0, 0, 0, 7], 21, 20),
    _problem("rows of none to eight entries", [*range(9), 0, 0, 3], 30, 17),
    _problem("in any order, several times", [6, 1, 0, 12, 4], 7, 18, _anywhere),
    _problem("a row that names one column only", [2, 11, 2], 9, 16, _last),
    _problem("a column that every row names", [1] * 65, 50, 19, _last),
    *(_problem(f"{rows} rows, few columns hot", [5] * rows, 150, 24, _zipf) for rows in (63, 64, 65, 200)),
    _problem("more columns than entries", [3] * 10, 5000, 4, _anywhere),
)

# Enough work for several threads; views of these would only repeat what the small ones show.
LARGE_PROBLEMS = (
    _problem("several threads, few columns hot", [16] * 200, 2000, 24, _zipf),
    _problem("several threads, everywhere", [8] * 150, 300, 40),
    _problem("several threads, one long row", [2] * 20 + [1500] + [2] * 20, 700, 33, _anywhere),
    _problem("several threads, one hot column", [1] * 1500, 64, 33, _last),
    _problem("several threads, two long rows", [1500, 600], 2000, 150, _anywhere),
)

SPECIAL_PROBLEMS = [p for p in (*PROBLEMS, *WIDTHS[::5]) if "row" in p.name or "k = n" in p.name or "width" in p.name]


def _bad(crow_indices: Sequence[int], indices: Sequence[int], columns: int = 8) -> tuple[Tensor, Tensor, int]:
    return torch.tensor(crow_indices, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32), columns


# Rows that no kernel may follow: (crow_indices, indices, columns).
BAD_ROWS = {
    **{
        f"index {bad} in place {place} of 40": _bad([0, 3, 3, 40], [1] * place + [bad] + [1] * (39 - place))
        for bad in (-1, 8, 2**31 - 1, -(2**31))
        for place in (0, 2, 17, 39)
    },
    "an entry, no columns": _bad([0, 1], [0], 0),
    "begins after 0": _bad([1, 2, 4], [1, 2, 3, 4]),
    "begins below 0": _bad([-2, 2, 4], [1, 2, 3, 4]),
    "falls": _bad([0, 3, 2, 4], [1, 2, 3, 4]),
    "falls below 0": _bad([0, -1, 4], [1, 2, 3, 4]),
    "rises over the end and comes back": _bad([0, 2**31 - 1, 4], [1, 2, 3, 4]),
    "ends before the last entry": _bad([0, 2, 3], [1, 2, 3, 4]),
    "ends after the last entry": _bad([0, 2, 5], [1, 2, 3, 4]),
    "entries without rows": _bad([0], [1, 2, 3, 4]),
    "rows without entries": _bad([0, 2, 3], []),
}

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
