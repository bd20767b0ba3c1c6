"""What every implementation of the products on sparse rows must pass. `test_the_row_checkers.py` shows that each one
can fail.

Operands and results of the definition are kept: they serve every backend and thread count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cases import Operands
from checkers import gamma, in_float64, poisoned_memory, unit_roundoff
from offpath.kernels import KernelError, reference_rows
from offpath.kernels.row_products import RowProducts
from problems import gaussian, small_integers
from row_cases import PRODUCTS, SPECIAL_PROBLEMS, RowProblem, RowProduct
from selection_cases import EncodeProblem, ks, scores, signs

DEFINITION = reference_rows.ROWS
SPARSE_WEIGHT = ("sparse_matmul", "sparse_dots", "sparse_weight_gradient")
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """The same numbers, zeros of the same sign, and NaN in the same places."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a.view(BITS.get(a.dtype, a.dtype)), b.view(BITS.get(b.dtype, b.dtype))):
        return True
    return bool(((a.isnan() & b.isnan()) | ((a == b) & (a.signbit() == b.signbit()))).all())


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same numbers, and NaN in the same places."""
    return a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def run_unmodified(run: Callable[[Operands], Any], operands: Operands, copies: Operands) -> Any:
    """What `run` gives on fresh NaN-filled memory; fails when it wrote to an operand."""
    with poisoned_memory():
        result = run(operands)
    for name, tensor in operands.items():
        if not same_bits(tensor, copies[name]):
            for drawn in (_drawn, _drawn_scores, _drawn_for_encoder):
                drawn.cache_clear()
            raise AssertionError(f"an operand was modified: {name}")
    return result


def _copies(operands: Operands) -> Operands:
    return {name: tensor.clone() for name, tensor in operands.items()}


@cache
def _drawn(product: RowProduct, problem: RowProblem, dtype: torch.dtype, draw: Callable) -> tuple[Operands, Operands]:
    operands = product.draw(problem, draw(1, dtype))
    return operands, _copies(operands)


@cache
def _defined(product: RowProduct, problem: RowProblem, dtype: torch.dtype, draw: Callable) -> tuple[Tensor, Tensor]:
    """The definition in float64, and the same of absolute operands."""
    operands = in_float64(_drawn(product, problem, dtype, draw)[1])
    size = product.run(DEFINITION, problem, {name: tensor.abs() for name, tensor in operands.items()})
    return product.run(DEFINITION, problem, operands), size


def _run(product: RowProduct, rows: RowProducts, problem: RowProblem, dtype: torch.dtype, draw: Callable) -> Tensor:
    return run_unmodified(lambda operands: product.run(rows, problem, operands), *_drawn(product, problem, dtype, draw))


def check_exact(product: RowProduct, rows: RowProducts, problem: RowProblem, dtype: torch.dtype) -> None:
    """Small integers: the same bits as the definition in float64."""
    result = _run(product, rows, problem, dtype, small_integers)
    expected = _defined(product, problem, dtype, small_integers)[0].to(dtype)
    assert result.dtype is dtype and result.shape == expected.shape
    assert torch.equal(result, expected), f"{product.name} on {problem.name}: not exact"


def check_bounded(product: RowProduct, rows: RowProducts, problem: RowProblem, dtype: torch.dtype) -> None:
    """Gaussian operands: |y - y64| <= gamma_k (|A| |x|), the a-priori bound for any order of summation."""
    result = _run(product, rows, problem, dtype, gaussian)
    exact, size = _defined(product, problem, dtype, gaussian)
    bound = _bound(product.terms(problem), size, dtype)
    if dtype is torch.bfloat16:  # the sum is rounded once more, relative to what was summed
        bound = bound + unit_roundoff(dtype) * (exact.abs() + bound)
    # Written so that NaN fails.
    within = (result.double() - exact).abs() <= bound
    assert bool(within.all()), f"{product.name} on {problem.name}: error over bound"


def _bound(terms: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a sum in `dtype` (bfloat16 is summed in float32); the float64 definition errs too, by the same formula."""
    summed_in = torch.float32 if dtype is torch.bfloat16 else dtype
    return (gamma(terms, summed_in) + gamma(terms, torch.float64)) * size


def check_topk(rows: RowProducts, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same entries and bits as the definition, for every k."""
    for k in ks(shape[1]):
        _check_selection(lambda x, k=k: rows.topk(x, k), _defined_topk(kind, shape, dtype, k), kind, shape, dtype, k)


def check_batch_topk(rows: RowProducts, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for k in ks(shape[0] * shape[1]):
        expected = _defined_batch_topk(kind, shape, dtype, k)
        _check_selection(lambda x, k=k: rows.batch_topk(x, k), expected, kind, shape, dtype, k)


def check_above(rows: RowProducts, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for name in THRESHOLDS:
        threshold, expected = _defined_above(kind, shape, dtype, name)
        _check_selection(lambda x, t=threshold: rows.above(x, t), expected, kind, shape, dtype, name)


def _check_selection(run, expected: tuple[Tensor, ...], kind, shape, dtype: torch.dtype, of: Any) -> None:
    result = run_unmodified(lambda operands: run(operands["x"]), *_drawn_scores(kind, shape, dtype))
    agree = len(result) == len(expected) and all(map(same_bits, result, expected))
    assert agree, f"{kind}, {shape}, {of}: other entries than those of the definition"


# Of what `above` lets through, by the scores: none, all, those over a number, and over what differs between columns.
THRESHOLDS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "nonzeros": lambda x: None,
    "zero": lambda x: x.new_zeros(x.shape[1]),
    "one": lambda x: x.new_ones(x.shape[1]),
    "+inf": lambda x: x.new_full(x.shape[1:], float("inf")),
    "-inf": lambda x: x.new_full(x.shape[1:], -float("inf")),
    "a score of each column": lambda x: x[:1].sum(0).nan_to_num(nan=0.25),
    "rising with the column": lambda x: torch.linspace(-2, 2, x.shape[1], dtype=x.dtype),
}


@cache
def _drawn_scores(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Operands, Operands]:
    operands = {"x": scores(kind, shape, dtype)}
    return operands, _copies(operands)


@cache
def _defined_topk(kind: str, shape: tuple[int, int], dtype: torch.dtype, k: int) -> tuple[Tensor, ...]:
    return DEFINITION.topk(scores(kind, shape, dtype), k)


@cache
def _defined_batch_topk(kind: str, shape: tuple[int, int], dtype: torch.dtype, k: int) -> tuple[Tensor, ...]:
    return DEFINITION.batch_topk(scores(kind, shape, dtype), k)


@cache
def _defined_above(kind: str, shape, dtype: torch.dtype, threshold: str) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    x = scores(kind, shape, dtype)
    return THRESHOLDS[threshold](x), DEFINITION.above(x, THRESHOLDS[threshold](x))


@cache
def _drawn_for_encoder(problem: EncodeProblem, dtype: torch.dtype, draw: Callable) -> tuple[Operands, Operands]:
    operands = problem.draw(draw(5, dtype))
    return operands, _copies(operands)


@cache
def _exact_scores(problem: EncodeProblem, dtype: torch.dtype, draw: Callable) -> tuple[Tensor, Tensor]:
    """In float64: the scores, and the scores of absolute operands."""
    operands = in_float64(_drawn_for_encoder(problem, dtype, draw)[1])
    x, weight = operands["x"], operands["weight"]
    bias = operands.get("bias", weight.new_zeros(weight.shape[0]))
    return x @ weight.t() + bias, x.abs() @ weight.t().abs() + bias.abs()


def _encode(rows: RowProducts, problem: EncodeProblem, dtype: torch.dtype, draw: Callable) -> tuple[Tensor, Tensor]:
    return run_unmodified(
        lambda operands: rows.encode_topk(operands["x"], operands["weight"], operands.get("bias"), problem.k),
        *_drawn_for_encoder(problem, dtype, draw),
    )


def check_encode_exact(rows: RowProducts, problem: EncodeProblem, dtype: torch.dtype) -> None:
    """Scores that are exact: the same entries as the definition, ties included."""
    values, indices = _encode(rows, problem, dtype, signs)
    expected, where = DEFINITION.topk(_exact_scores(problem, dtype, signs)[0], problem.k)
    assert torch.equal(indices, where) and indices.dtype is torch.int32, f"{problem.name}: other entries"
    assert values.dtype is dtype and torch.equal(values.double(), expected), f"{problem.name}: not exact"


def check_encode_bounded(rows: RowProducts, problem: EncodeProblem, dtype: torch.dtype) -> None:
    """Gaussian operands: each value is within the bound of its exact score, and what is missing could be smaller.

    With |c - s| <= e for every computed c and exact s: c_missing <= c_chosen implies s_missing - e <= s_chosen + e.
    """
    values, indices = _encode(rows, problem, dtype, gaussian)
    exact, size = _exact_scores(problem, dtype, gaussian)
    bound = _bound(torch.tensor(problem.width + problem.bias), size, dtype)
    assert values.dtype is dtype and indices.dtype is torch.int32
    assert values.shape == indices.shape == (problem.rows, problem.k)
    assert bool((indices[:, 1:] > indices[:, :-1]).all()), f"{problem.name}: not ascending"
    assert not indices.numel() or (int(indices.min()) >= 0 and int(indices.max()) < problem.latents)
    chosen = indices.long()
    bound_of_values = bound
    if dtype is torch.bfloat16:  # chosen by their sums, which are rounded once more
        bound_of_values = bound + unit_roundoff(dtype) * (exact.abs() + bound)
    within = (values.double() - exact.gather(1, chosen)).abs() <= bound_of_values.gather(1, chosen)
    assert bool(within.all()), f"{problem.name}: a value is over the bound"
    if 0 < problem.k < problem.latents:
        most_of_missing = (exact - bound).scatter(1, chosen, -float("inf")).amax(1)
        least_of_chosen = (exact + bound).gather(1, chosen).amin(1)
        assert bool((most_of_missing <= least_of_chosen).all()), f"{problem.name}: a larger score is missing"


def check_encode_scores(rows: RowProducts, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """An encoder whose scores are those of a table: exact, whatever stands in it."""
    x, table = torch.eye(shape[0], dtype=dtype), scores(kind, shape, dtype)
    exact = x.double() @ table.double()
    for k in ks(shape[1]):
        values, indices = rows.encode_topk(x, table.t(), None, k)
        expected, where = DEFINITION.topk(exact, k)
        agree = same_bits(indices, where) and same_numbers(values.double(), expected)
        assert agree, f"{kind}, {shape}, {k}: other entries than those of the definition"


def check_counts(rows: RowProducts, problem: RowProblem) -> None:
    expected = [problem.indices.tolist().count(column) for column in range(min(problem.columns, 60))]
    result = rows.counts(problem.indices, problem.columns)
    assert result.dtype is torch.int32 and result.shape == (problem.columns,)
    assert result[:60].tolist() == expected and int(result.sum()) == problem.indices.shape[0]


# Bits that do not survive a sum with zero, or the way through another dtype: a signalling NaN, -0.0, a subnormal.
STALE = {
    torch.float32: (0x7F812345, -(2**31), 1),
    torch.float64: (0x7FF0000000012345, -(2**63), 1),
    torch.bfloat16: (0x7F85, -(2**15), 1),
}


def check_untouched(rows: RowProducts, problem: RowProblem, dtype: torch.dtype) -> None:
    """Rows of the buffer that no entry names keep every bit, whatever it says, also the second time."""
    draw = small_integers(6, dtype)
    values, dy = draw(problem.indices.shape), draw((problem.rows, problem.width))
    named = torch.bincount(problem.indices, minlength=problem.columns) > 0
    buffer = draw((problem.columns, problem.width))
    gradient = DEFINITION.weight_gradient(
        problem.crow_indices, problem.indices, values.double(), dy.double(), problem.columns
    )
    expected = (buffer + gradient).to(dtype) + gradient  # integers: what is added is exact, and rounded each time
    for stale in STALE[dtype]:
        marked = torch.where(named[:, None], buffer.view(BITS[dtype]), stale).view(dtype)
        before = marked.clone()
        for _ in range(2):
            rows.add_weight_gradient(problem.crow_indices, problem.indices, values, dy, marked)
        assert torch.equal(marked[named], expected[named].to(dtype)), f"{problem.name}: not added"
        kept = torch.equal(marked[~named].view(BITS[dtype]), before[~named].view(BITS[dtype]))
        assert kept, f"{problem.name}: wrote to a row of the buffer without an entry"


def check_refuses(rows: RowProducts, crow_indices: Tensor, indices: Tensor, columns: int) -> None:
    """Every product refuses these rows, and nothing is written."""
    width = 5
    values, dy = torch.ones(indices.shape[0]), torch.ones(crow_indices.shape[0] - 1, width)
    weight, buffer = torch.ones(columns, width), torch.ones(columns, width)
    connections = torch.arange(columns + 1, dtype=torch.int32), torch.zeros(columns, dtype=torch.int32)
    calls: list[Callable[[], object]] = [
        lambda: rows.matmul(crow_indices, indices, values, weight),
        lambda: rows.dots(crow_indices, indices, dy, weight),
        lambda: rows.weight_gradient(crow_indices, indices, values, dy, columns),
        lambda: rows.add_weight_gradient(crow_indices, indices, values, dy, buffer),
        lambda: rows.encoder_gradients(crow_indices, indices, values, dy, columns),
        lambda: rows.written_out(crow_indices, indices, values, columns),
        lambda: rows.dense_dots(crow_indices, indices, dy, weight),
        lambda: rows.sparse_matmul(crow_indices, indices, values, *connections, torch.ones(columns), width),
        lambda: rows.sparse_dots(crow_indices, indices, dy, *connections, torch.ones(columns)),
        lambda: rows.sparse_weight_gradient(crow_indices, indices, values, dy, *connections),
    ]
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        calls.append(lambda: rows.counts(indices, columns))
    for call in calls:
        try:
            call()
        except KernelError as error:
            assert "expected" in str(error)
        else:
            raise AssertionError("rows that no kernel may follow were not refused")
        assert torch.equal(buffer, torch.ones(columns, width)), "wrote to the buffer before it refused"


def check_special(rows: RowProducts, dtype: torch.dtype) -> None:
    """NaN and infinities go where the definition has them, and nowhere else."""
    product = {p.field: p for p in PRODUCTS}
    for problem in SPECIAL_PROBLEMS:
        for field in (
            "matmul",
            "dots",
            "weight_gradient",
            "add_weight_gradient",
            "written_out",
            "encoder_gradients",
            *SPARSE_WEIGHT,
        ):
            check_with(product[field], rows, problem, dtype, specials)
        # What no entry names: NaN there must not be read, not even to be multiplied with zero.
        named = torch.bincount(problem.indices, minlength=problem.columns) > 0
        live = problem.crow_indices.diff() > 0
        for field, operand, read in (("matmul", "weight", named), ("dots", "weight", named), ("dots", "dy", live)):
            _check_unread(product[field], rows, problem, dtype, operand, read)
        for field in ("weight_gradient", "add_weight_gradient", "sparse_weight_gradient", "sparse_dots"):
            _check_unread(product[field], rows, problem, dtype, "dy", live)
        for field in ("sparse_matmul", "sparse_dots"):
            of_named = named[problem.weight.row_indices().long()]
            _check_unread(product[field], rows, problem, dtype, "w_values", of_named)


def check_with(product: RowProduct, rows: RowProducts, problem: RowProblem, dtype: torch.dtype, draw: Callable) -> None:
    """The same numbers as the definition in float64, where every sum is exact or not finite."""
    result = _run(product, rows, problem, dtype, draw)
    expected = _defined(product, problem, dtype, draw)[0].to(dtype)
    assert same_numbers(result, expected), f"{product.name} on {problem.name}: other numbers"


def _check_unread(
    product: RowProduct, rows: RowProducts, problem: RowProblem, dtype, operand: str, read: Tensor
) -> None:
    operands = _copies(_drawn(product, problem, dtype, small_integers)[1])
    operands[operand][~read] = float("nan")
    result = product.run(rows, problem, operands)
    expected = _defined(product, problem, dtype, small_integers)[0].to(dtype)
    assert torch.equal(result, expected), f"{product.name} on {problem.name}: read {operand} where no entry is"


def specials(seed: int, dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    """Small integers, and one in six is NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([*range(-3, 4)] * 15 + [float("nan"), float("inf"), -float("inf")] * 7).to(dtype)
    return lambda shape: table[torch.randint(len(table), shape, generator=generator)]


def subnormals(seed: int, dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    """The values count in the smallest number of the dtype, as does the buffer; the matrices are small integers."""
    integers = small_integers(seed, dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    calls = iter((smallest, 1.0, smallest))
    return lambda shape: integers(shape) * next(calls)
