"""The ops: gradients, registration, compilation, refusals."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from checkers import gamma
from offpath import SparseLinear, kernels, pattern as patterns
from offpath.kernels import Backend, KernelError
from offpath.nn import SparseConv2d
from offpath.ops import forced_methods, sparse_linear
from offpath.ops.prepared import _entries
from offpath.pattern import Pattern, PatternError
from problems import PROBLEMS, WIDTHS, Problem, gaussian

SMALL = [p for p in (*WIDTHS[:4], *PROBLEMS) if not p.name.startswith(("several", "batch over", "strips"))]
OPS = torch.ops.offpath

# What is large enough to be split among threads asks for `threads`.
pytestmark = pytest.mark.usefixtures("one_thread")


def _operands(problem: Problem, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Pattern]:
    pattern = problem.pattern
    draw = gaussian(11, dtype)
    x = draw((problem.batch, pattern.shape[1])).requires_grad_()
    values = draw((pattern.nnz,)).requires_grad_()
    return x, values, draw((pattern.shape[0],)).requires_grad_() if bias else None, pattern


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_gradcheck_in_float64(backend: Backend, problem: Problem, bias: bool) -> None:
    x, values, b, p = _operands(problem, torch.float64, bias)
    assert gradcheck(lambda *a: sparse_linear(*a, p.crow_indices, p.col_indices), (x, values, b))


@pytest.mark.parametrize("problem", (*WIDTHS[:17], *PROBLEMS), ids=lambda p: p.name)
def test_float32_gradients_are_within_the_bound_of_the_float64_reference(
    backend: Backend, problem: Problem, threads: int
) -> None:
    x, values, bias, pattern = _operands(problem, torch.float32)
    y = sparse_linear(x, values, bias, pattern.crow_indices, pattern.col_indices)
    dy = gaussian(12, torch.float32)(tuple(y.shape))
    results = torch.autograd.grad(y, (x, values, bias), dy)

    def reference_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Autograd of the definition, in float64."""
        x64, values64, bias64, dy64 = (t.detach().double() for t in tensors)
        leaves = [t.requires_grad_() for t in (x64, values64, bias64)]
        y64 = kernels.backends()["reference"].spmm(
            pattern.crow_indices, pattern.col_indices, leaves[1], leaves[0], leaves[2]
        )
        return torch.autograd.grad(y64, leaves, dy64)

    exact = reference_gradients(x, values, bias, dy)
    # Each gradient is a sum of products of two operands, so absolute operands give its bound's |A| |x|.
    size = reference_gradients(x.abs(), values.abs(), bias.abs(), dy.abs())
    batch = torch.tensor(problem.batch)
    terms = (pattern.transpose().crow_indices.diff(), batch, batch)
    for result, e, s, k in zip(results, exact, size, terms, strict=True):
        assert bool(((result.double() - e).abs() <= gamma(k, torch.float32) * s).all())


OPCHECKED = [p for p in PROBLEMS if p.name in ("one connection", "no connections", "rows of one to eight connections")]


@pytest.mark.parametrize("problem", OPCHECKED, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which opcheck reads
def test_opcheck(problem: Problem, dtype: torch.dtype) -> None:
    x, values, bias, p = _operands(problem, dtype)
    opcheck(OPS.sparse_linear.default, (x, values, bias, p.crow_indices, p.col_indices))
    opcheck(OPS.sparse_linear.default, (x, values, None, p.crow_indices, p.col_indices))
    dy = torch.randn(problem.batch, p.shape[0], dtype=dtype)
    dy.requires_grad_()
    opcheck(OPS.sparse_linear_dx.default, (dy, values, p.crow_indices, p.col_indices, p.shape[1]))
    opcheck(OPS.sparse_linear_backward.default, (dy, x, values, p.crow_indices, p.col_indices))
    opcheck(OPS.sparse_linear_dvalues.default, (dy, x, p.crow_indices, p.col_indices))


def test_compile_without_graph_breaks_gives_the_same_numbers() -> None:
    pattern = patterns.random((24, 40), 96, torch.Generator().manual_seed(0))
    x, values, bias = (gaussian(i, torch.float32)(s).requires_grad_() for i, s in enumerate([(7, 40), (96,), (24,)]))

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, values, bias, pattern.crow_indices, pattern.col_indices) * 2

    compiled = torch.compile(run, fullgraph=True)
    for batch in (7, 3):
        x = x.detach()[:batch].requires_grad_()
        expected = run(x, values, bias)
        result = compiled(x, values, bias)
        assert torch.equal(result, expected)
        dy = torch.randn_like(result)
        dx, dvalues, dbias = torch.autograd.grad(result, (x, values, bias), dy)
        expected_dx, expected_dvalues, expected_dbias = torch.autograd.grad(expected, (x, values, bias), dy)
        assert torch.equal(dx, expected_dx) and torch.equal(dvalues, expected_dvalues)
        # The compiler sums dbias itself, in an order of its own.
        bound = 2 * gamma(torch.tensor(batch), torch.float32) * (2 * dy).abs().sum(0)
        assert bool(((dbias - expected_dbias).abs() <= bound).all())


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_the_gradients_asked_for_are_computed(wanted: str) -> None:
    x, values, bias, pattern = _operands(PROBLEMS[7], torch.float64)
    operands = {"x": x, "values": values, "bias": bias}
    for name, tensor in operands.items():
        tensor.requires_grad_(name == wanted)
    y = sparse_linear(**operands, crow_indices=pattern.crow_indices, col_indices=pattern.col_indices)
    y.sum().backward()
    assert [name for name, tensor in operands.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 0, 3), (0,)])
def test_leading_dimensions(backend: Backend, leading: tuple[int, ...]) -> None:
    pattern = patterns.random((4, 6), 10, torch.Generator().manual_seed(0))
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(10, dtype=torch.float64, requires_grad=True)
    y = sparse_linear(x, values, None, pattern.crow_indices, pattern.col_indices)
    expected = torch.nn.functional.linear(x, pattern.to_dense(values))
    assert y.shape == expected.shape and y.is_contiguous()
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_indices_that_are_not_canonical_are_refused_before_any_kernel_runs() -> None:
    crow = torch.tensor([0, 1, 2], dtype=torch.int32)
    out_of_range = torch.tensor([0, 1_000_000], dtype=torch.int32)
    with pytest.raises(PatternError, match="got 1000000"):
        OPS.sparse_linear(torch.randn(3, 4), torch.randn(2), None, crow, out_of_range)
    fine = torch.tensor([0, 3], dtype=torch.int32)
    OPS.sparse_linear(torch.randn(3, 4), torch.randn(2), None, crow, fine)
    with pytest.raises(PatternError, match="got 3"):
        OPS.sparse_linear(torch.randn(3, 2), torch.randn(2), None, crow, fine)


def test_operands_of_different_dtypes_are_refused() -> None:
    pattern = patterns.full((2, 3))
    with pytest.raises(KernelError, match="expected x and values of one dtype"):
        sparse_linear(torch.randn(1, 3), torch.randn(6).double(), None, pattern.crow_indices, pattern.col_indices)
    with pytest.raises(KernelError, match=r"no kernels for torch\.float16"):
        sparse_linear(torch.randn(1, 3).half(), torch.randn(6).half(), None, pattern.crow_indices, pattern.col_indices)


def _overwritten_by_data(tensor: Tensor, new: Tensor) -> None:
    tensor.data.copy_(new)


def _overwritten_by_numpy(tensor: Tensor, new: Tensor) -> None:
    tensor.numpy()[:] = new.numpy()


def _overwritten_in_place(tensor: Tensor, new: Tensor) -> None:
    tensor.copy_(new)


def _replaced_data(tensor: Tensor, new: Tensor) -> None:
    tensor.data = new


OVERWRITES = [_overwritten_by_data, _overwritten_by_numpy, _overwritten_in_place, _replaced_data]


@pytest.mark.parametrize("overwrite", OVERWRITES)
def test_topology_that_was_overwritten_is_noticed_however_it_was_done(backend: Backend, overwrite) -> None:
    """torch's version counter sees one of these four; a broadcast of DistributedDataParallel is another it misses."""
    before, after = (patterns.random((6, 8), 24, torch.Generator().manual_seed(s)) for s in (0, 1))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn(24, dtype=torch.float64, requires_grad=True)
    crow, col = before.crow_indices.clone(), before.col_indices.clone()
    sparse_linear(x, values, None, crow, col).sum().backward()
    overwrite(crow, after.crow_indices.clone())
    overwrite(col, after.col_indices.clone())
    x.grad = values.grad = None
    y = sparse_linear(x, values, None, crow, col)
    y.square().sum().backward()
    expected_x, expected_values = x.detach().requires_grad_(), values.detach().requires_grad_()
    expected = torch.nn.functional.linear(expected_x, after.to_dense(expected_values))
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, expected_x.grad)
    torch.testing.assert_close(values.grad, expected_values.grad)


@pytest.mark.parametrize("overwrite", OVERWRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_topology_overwritten_with_garbage_is_refused_instead_of_read(overwrite, mode) -> None:
    with mode():
        pattern = patterns.random((6, 8), 24, torch.Generator().manual_seed(0))
        x, values, col = torch.randn(5, 8), torch.randn(24), pattern.col_indices.clone()
        sparse_linear(x, values, None, pattern.crow_indices, col)
        overwrite(col, torch.full_like(col, 2**30))
        with pytest.raises(PatternError, match="got 1073741824"):
            sparse_linear(x, values, None, pattern.crow_indices, col)


@pytest.mark.parametrize("method", ["bucketed", "dense"])
@pytest.mark.parametrize(
    ("make", "shape"), [(partial(SparseLinear, 8, 6), (3, 8)), (partial(SparseConv2d, 2, 4, 3), (3, 2, 5, 5))]
)
def test_what_is_prepared_dies_with_its_layer_without_the_collector(make, shape, method: str) -> None:
    """Or plans of many topologies are held at once, hundreds of megabytes each, of which Python sees a few objects."""
    layer = make()
    prepared = weakref.ref(layer._connections._prepared)
    gc.disable()
    try:
        with forced_methods(forward=method, dx=method):
            layer(torch.ones(shape, requires_grad=True)).sum().backward()
        assert prepared().bytes > layer.pattern.index_bytes, "nothing was prepared"
        del layer
        assert prepared() is None
    finally:
        gc.enable()


def test_what_is_prepared_dies_with_the_tensors() -> None:
    gc.collect()
    before = len(_entries)
    for seed in range(50):
        pattern = patterns.random((5, 6), 7, torch.Generator().manual_seed(seed))
        sparse_linear(torch.randn(2, 6), torch.randn(7), None, pattern.crow_indices, pattern.col_indices)
    del pattern
    gc.collect()
    assert len(_entries) == before


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("sparse_linear", {"values": torch.randn(23)}),
        ("sparse_linear", {"values": torch.randn(1)}),
        ("sparse_linear", {"values": torch.randn(24).double()}),
        ("sparse_linear", {"bias": torch.randn(1)}),
        ("sparse_linear", {"bias": torch.randn(6).double()}),
        ("sparse_linear_dx", {"values": torch.randn(25)}),
        ("sparse_linear_dx", {"dy": torch.randn(30, 1)}),
        ("sparse_linear_dx", {"dy": torch.randn(5, 6).double()}),
        ("sparse_linear_dvalues", {"dy": torch.randn(1, 6)}),
        ("sparse_linear_dvalues", {"dy": torch.randn(5, 7)}),
        ("sparse_linear_dvalues", {"dy": torch.randn(5, 6).double()}),
        ("sparse_linear_backward", {"values": torch.randn(25)}),
        ("sparse_linear_backward", {"dy": torch.randn(4, 6)}),
        ("sparse_linear_backward", {"dy": torch.randn(5, 6).double()}),
    ],
)
def test_misfitting_operands_are_refused_by_every_backend(backend: Backend, op: str, change: dict) -> None:
    pattern = patterns.random((6, 8), 24, torch.Generator().manual_seed(0))
    indices = {"crow_indices": pattern.crow_indices, "col_indices": pattern.col_indices}
    operands = {
        "sparse_linear": {"x": torch.randn(5, 8), "values": torch.randn(24), "bias": torch.randn(6)},
        "sparse_linear_dx": {"dy": torch.randn(5, 6), "values": torch.randn(24), "in_features": 8},
        "sparse_linear_dvalues": {"dy": torch.randn(5, 6), "x": torch.randn(5, 8)},
        "sparse_linear_backward": {"dy": torch.randn(5, 6), "x": torch.randn(5, 8), "values": torch.randn(24)},
    }[op] | indices
    getattr(OPS, op)(**operands)  # as it stands it fits
    with pytest.raises(KernelError, match="expected"):
        getattr(OPS, op)(**(operands | change))


def test_freed_storage_is_refused_instead_of_read() -> None:
    pattern = patterns.full((2, 3))
    x, values = torch.randn(4, 3), torch.randn(6)
    values.untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="storage was freed"):
        sparse_linear(x, values, None, pattern.crow_indices, pattern.col_indices)


def test_threads_that_compute_at_once_do_not_disturb_each_other(threads: int) -> None:
    pattern = patterns.random((64, 96), 600, torch.Generator().manual_seed(0))
    values, inputs = torch.randn(600), [torch.randn(128, 96) for _ in range(8)]
    expected = [sparse_linear(x, values, None, pattern.crow_indices, pattern.col_indices) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            col = pattern.col_indices.clone()  # so that the threads also race to prepare it
            run = partial(sparse_linear, values=values, bias=None, crow_indices=pattern.crow_indices)
            results = list(pool.map(lambda x, run=run, col=col: run(x, col_indices=col), inputs))
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_inference_mode() -> None:
    pattern = patterns.full((2, 3))
    x, values = torch.randn(4, 3), torch.randn(6)
    with torch.inference_mode():
        result = sparse_linear(x, values, None, pattern.crow_indices, pattern.col_indices)
    assert torch.equal(result, sparse_linear(x, values, None, pattern.crow_indices, pattern.col_indices))


def test_values_that_were_exchanged_between_forward_and_backward_are_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with kernels.forced(kernels.default_backend()[0]):
        layer = SparseLinear(8, 8, sparsity=0.5)
        with forced_methods(forward="row-wise", dx="row-wise", dvalues="row-wise"):
            y = layer(x)
            layer.values.data = torch.zeros(layer.nnz + 1)  # autograd does not count it
            with pytest.raises(KernelError, match="one value for each of the 32 connections"):
                y.sum().backward()
