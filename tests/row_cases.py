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


def _encoder_gradients(rows: RowProducts, p: RowProblem, operands: Operands) -> Tensor:
    gradient, sums = rows.encoder_gradients(p.crow_indices, p.indices, operands["values"], operands["dy"], p.columns)
    return torch.cat([gradient, sums[:, None]], dim=1)


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
            f"encoder gradients, dy {layout}",
            "encoder_gradients",
            lambda p, draw: {"values": draw(p.indices.shape), "dy": lay(draw, p.rows, p.width)},
            _encoder_gradients,
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
