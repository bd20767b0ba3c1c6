"""The ops on sparse rows and `SparseRows`: gradients, registration, compilation, refusals, what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from offpath import kernels
from offpath.kernels import Backend
from offpath.ops import SparseRows, encode_topk
from problems import gaussian, small_integers
from row_cases import PROBLEMS, RowProblem

OPS = torch.ops.offpath
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=list(kernels.backends()))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with kernels.forced(request.param) as chosen:
        yield chosen


@dataclass(frozen=True)
class Op:
    """One op on the entries of a problem: its operands, the differentiable ones first, and what it computes densely."""

    name: str
    shapes: Callable[[RowProblem], list[tuple[int, ...]]]
    run: Callable[..., Tensor]
    dense: Callable[..., Tensor]


def _dense(p: RowProblem, values: Tensor) -> Tensor:
    row = torch.arange(p.rows).repeat_interleave(p.crow_indices.diff().long())
    return values.new_zeros(p.rows, p.columns).index_put((row, p.indices.long()), values, accumulate=True)


def _at_entries(p: RowProblem, matrix: Tensor) -> Tensor:
    row = torch.arange(p.rows).repeat_interleave(p.crow_indices.diff().long())
    return matrix[row, p.indices.long()]


def _chosen(x: Tensor, k: int) -> Tensor:
    return x.gather(1, x.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values)


def _weight(p: RowProblem, w_values: Tensor) -> Tensor:
    weight = p.weight
    return w_values.new_zeros(p.columns, p.width).index_put(
        (weight.row_indices().long(), weight.col_indices.long()), w_values
    )


def _at_connections(p: RowProblem, matrix: Tensor) -> Tensor:
    weight = p.weight
    return matrix[weight.row_indices().long(), weight.col_indices.long()]


def _indices_of(p: RowProblem) -> tuple[Tensor, Tensor]:
    return p.weight.crow_indices, p.weight.col_indices


def _together(*results: Tensor) -> Tensor:
    return torch.cat([result.flatten() for result in results])


OPERATIONS = (
    Op(
        "rows_sparse_matmul",
        lambda p: [p.indices.shape, (p.weight.nnz,)],
        lambda p, values, w_values: OPS.rows_sparse_matmul(
            values, p.crow_indices, p.indices, w_values, *_indices_of(p), p.width
        ),
        lambda p, values, w_values: _dense(p, values) @ _weight(p, w_values),
    ),
    Op(
        "rows_sparse_dots",
        lambda p: [(p.rows, p.width), (p.weight.nnz,)],
        lambda p, dy, w_values: OPS.rows_sparse_dots(dy, p.crow_indices, p.indices, w_values, *_indices_of(p)),
        lambda p, dy, w_values: _at_entries(p, dy @ _weight(p, w_values).t()),
    ),
    Op(
        "rows_sparse_weight_gradient",
        lambda p: [p.indices.shape, (p.rows, p.width)],
        lambda p, values, dy: OPS.rows_sparse_weight_gradient(values, p.crow_indices, p.indices, dy, *_indices_of(p)),
        lambda p, values, dy: _at_connections(p, _dense(p, values).t() @ dy),
    ),
    Op(
        "rows_matmul",
        lambda p: [p.indices.shape, (p.columns, p.width)],
        lambda p, values, weight: OPS.rows_matmul(values, p.crow_indices, p.indices, weight),
        lambda p, values, weight: _dense(p, values) @ weight,
    ),
    Op(
        "rows_dots",
        lambda p: [(p.rows, p.width), (p.columns, p.width)],
        lambda p, dy, weight: OPS.rows_dots(dy, p.crow_indices, p.indices, weight),
        lambda p, dy, weight: _at_entries(p, dy @ weight.t()),
    ),
    Op(
        "rows_weight_gradient",
        lambda p: [p.indices.shape, (p.rows, p.width)],
        lambda p, values, dy: OPS.rows_weight_gradient(values, p.crow_indices, p.indices, dy, p.columns),
        lambda p, values, dy: _dense(p, values).t() @ dy,
    ),
    Op(
        "rows_gradients",
        lambda p: [(p.rows, p.width), p.indices.shape, (p.columns, p.width)],
        lambda p, dy, values, weight: _together(*OPS.rows_gradients(dy, values, p.crow_indices, p.indices, weight)),
        lambda p, dy, values, weight: _together(_at_entries(p, dy @ weight.t()), _dense(p, values).t() @ dy),
    ),
    Op(
        "topk_rows",
        lambda p: [(p.rows, p.columns)],
        lambda p, x: OPS.topk_rows(x, min(2, p.columns))[0],
        lambda p, x: _chosen(x, min(2, p.columns)),
    ),
    Op(
        "batch_topk",
        lambda p: [(p.rows, p.columns)],
        lambda p, x: OPS.batch_topk(x, p.rows * p.columns // 3)[2],
        lambda p, x: _chosen(x.reshape(1, -1), p.rows * p.columns // 3)[0],
    ),
    Op(
        "above",
        lambda p: [(p.rows, p.columns)],
        lambda p, x: OPS.above(x, x.new_full(x.shape[1:], 0.25))[2],
        lambda p, x: x[x > 0.25],
    ),
    Op(
        "encode_topk",
        lambda p: [(p.rows, p.width), (p.columns, p.width), (p.columns,)],
        lambda p, x, weight, bias: OPS.encode_topk(x, weight, bias, min(2, p.columns))[0],
        lambda p, x, weight, bias: _chosen(x @ weight.t() + bias, min(2, p.columns)),
    ),
    Op(
        "encode_topk without bias",
        lambda p: [(p.rows, p.width), (p.columns, p.width)],
        lambda p, x, weight: OPS.encode_topk(x, weight, None, min(2, p.columns))[0],
        lambda p, x, weight: _chosen(x @ weight.t(), min(2, p.columns)),
    ),
)
every_op = pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
NAMED = {p.name: p for p in PROBLEMS}


def _small(name: str, columns: int, width: int, *rows: list[int]) -> RowProblem:
    crow_indices = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return RowProblem(
        name, crow_indices, torch.tensor([index for row in rows for index in row], dtype=torch.int32), columns, width
    )


# gradgradcheck perturbs every entry of every operand twice.
SMALL = (
    _small("rows that differ, one twice in a row, one empty", 4, 2, [2, 0, 2], [], [3]),
    _small("no entries", 3, 2, [], []),
    _small("no rows", 3, 2),
    _small("one entry", 1, 1, [0]),
)


def _leaves(op: Op, problem: RowProblem, draw: Callable) -> list[Tensor]:
    return [draw(tuple(shape)).requires_grad_() for shape in op.shapes(problem)]


@every_op
def test_gradcheck_and_gradgradcheck_in_float64(op: Op, backend: Backend) -> None:
    for problem in SMALL:
        leaves = _leaves(op, problem, gaussian(11, torch.float64))
        run = partial(op.run, problem)
        assert gradcheck(run, leaves) and gradgradcheck(run, leaves), problem.name


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_dense_product(op: Op, dtype: torch.dtype, backend: Backend) -> None:
    """Integers whose every sum is exact; `sum()` hands the backward pass one number with strides of 0."""
    for problem in (NAMED["rows of none to eight entries"], NAMED["in any order, several times"], *SMALL):
        leaves = _leaves(op, problem, small_integers(12, dtype))
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        y, expected = op.run(problem, *leaves), op.dense(problem, *exact)
        assert torch.equal(y, expected.to(dtype))
        for dy in (torch.ones(1, dtype=dtype).expand_as(y), small_integers(13, dtype)(tuple(y.shape))):
            gradients = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            others = torch.autograd.grad(expected, exact, dy.double(), retain_graph=True)
            for gradient, other in zip(gradients, others, strict=True):
                assert gradient.dtype is dtype
                assert torch.equal(gradient, other.to(dtype)), f"{op.name} on {problem.name}"


@pytest.mark.parametrize("op", [op for op in OPERATIONS if len(op.shapes(SMALL[0])) > 1], ids=lambda op: op.name)
def test_only_the_gradients_asked_for_are_computed(op: Op) -> None:
    for wanted in range(len(op.shapes(SMALL[0]))):
        leaves = _leaves(op, SMALL[0], gaussian(13, torch.float64))
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        op.run(SMALL[0], *leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(len(leaves))]


@pytest.mark.parametrize("problem", SMALL[:2], ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which opcheck reads
def test_opcheck(problem: RowProblem) -> None:
    draw, p = gaussian(14, torch.float32), problem
    rows = (p.crow_indices, p.indices)
    values, x, bias = (draw(shape).requires_grad_() for shape in (p.indices.shape, (p.rows, p.columns), (p.columns,)))
    weight, dy = draw((p.columns, p.width)).requires_grad_(), draw((p.rows, p.width)).requires_grad_()
    opcheck(OPS.rows_matmul.default, (values, *rows, weight))
    opcheck(OPS.rows_dots.default, (dy, *rows, weight))
    opcheck(OPS.rows_weight_gradient.default, (values, *rows, dy, p.columns))
    opcheck(OPS.rows_gradients.default, (dy, values, *rows, weight))
    w_values = draw((p.weight.nnz,)).requires_grad_()
    opcheck(OPS.rows_sparse_matmul.default, (values, *rows, w_values, *_indices_of(p), p.width))
    opcheck(OPS.rows_sparse_dots.default, (dy, *rows, w_values, *_indices_of(p)))
    opcheck(OPS.rows_sparse_weight_gradient.default, (values, *rows, dy, *_indices_of(p)))
    buffer = draw((p.columns, p.width))
    opcheck(OPS.add_rows_weight_gradient.default, (buffer, values.detach(), *rows, dy.detach()))
    opcheck(OPS.topk_rows.default, (x, 2))
    # The fourth check sums all outputs of an op into the first one, which is of integers here; compiled below instead.
    three = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(OPS.batch_topk.default, (x, 3), test_utils=three)
    opcheck(OPS.above.default, (x, bias.detach()), test_utils=three)
    opcheck(OPS.encode_topk.default, (dy, weight, bias, 2))
    opcheck(OPS.encode_topk.default, (dy, weight, None, 2))


@every_op
def test_compile_without_graph_breaks_gives_the_same_numbers(op: Op) -> None:
    torch._dynamo.reset()  # all cases compile one lambda, and fullgraph refuses the ninth time
    compiled = torch.compile(lambda *operands: op.run(SMALL[0], *operands), fullgraph=True, backend="aot_eager")
    leaves = _leaves(op, SMALL[0], gaussian(15, torch.float32))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = compiled(*leaves)
    expected = op.run(SMALL[0], *leaves)
    assert torch.equal(result, expected)
    dy = torch.randn_like(expected)
    gradients, others = (torch.autograd.grad(y, leaves, dy) for y in (result, expected))
    assert all(map(torch.equal, gradients, others))


def test_a_whole_layer_compiles_without_graph_breaks() -> None:
    encoder, decoder, bias = torch.randn(24, 8), torch.randn(24, 8), torch.randn(24)
    buffer, other = torch.zeros(24, 8), torch.zeros(24, 8)

    def run(x: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor, buffer: Tensor) -> Tensor:
        rows = encode_topk(x, encoder, bias, 3).relu()
        rows.add_weight_gradient(x, buffer)
        return rows.matmul(decoder) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")  # the ops and their gradients; no code is made
    for batch in (5, 9):
        leaves = [t.detach().clone().requires_grad_() for t in (torch.randn(batch, 8), encoder, decoder, bias)]
        result, expected = compiled(*leaves, buffer), run(*leaves, other)
        assert torch.equal(result, expected) and torch.equal(buffer, other)
        dy = torch.randn_like(expected)
        gradients, others = (torch.autograd.grad(y, leaves, dy) for y in (result, expected))
        assert all(map(torch.equal, gradients, others))


def test_entries_at_one_place_add_up_in_float32() -> None:
    """bfloat16 would count to 256."""
    rows = SparseRows(torch.tensor([0, 2000]).int(), torch.zeros(2000).int(), torch.ones(2000).bfloat16(), 2)
    assert rows.to_dense().tolist() == [[2000, 0]]
