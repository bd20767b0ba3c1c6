"""What the products on sparse rows must refuse, and what must not change their results."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from cases import Operands
from offpath import kernels
from offpath.kernels import Backend, KernelError, cpu
from offpath.kernels.row_products import RowProducts
from problems import freed, gaussian, small_integers
from row_cases import BAD_ROWS, LARGE_PROBLEMS, NATIVE, PROBLEMS, PRODUCTS, RowProblem, RowProduct, every_backend
from row_checkers import DEFINITION, check_refuses, check_with, same_bits, subnormals
from selection_cases import ENCODE_PROBLEMS, EncodeProblem, scores

NATIVE_NAMES = [name for name in kernels.backends() if name.startswith("cpu:")]
PROBLEM = PROBLEMS[12]
Result = tuple[Tensor, ...]


def _calls(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[RowProducts], Result]]:
    """One call of every field, of a size that occupies several threads."""
    p, draw, x = LARGE_PROBLEMS[0], gaussian(3, dtype), scores("many ties", (70, 400), dtype)
    values, weight, dy = draw(p.indices.shape), draw((p.columns, p.width)), draw((p.rows, p.width))
    encoder = EncodeProblem(130, 300, 20, 9).draw(draw)

    def added(rows: RowProducts) -> Result:
        buffer = weight.clone()
        rows.add_weight_gradient(p.crow_indices, p.indices, values, dy, buffer)
        return (buffer,)

    return {
        "matmul": lambda rows: (rows.matmul(p.crow_indices, p.indices, values, weight),),
        "dots": lambda rows: (rows.dots(p.crow_indices, p.indices, dy, weight),),
        "weight_gradient": lambda rows: (rows.weight_gradient(p.crow_indices, p.indices, values, dy, p.columns),),
        "add_weight_gradient": added,
        "encoder_gradients": lambda rows: rows.encoder_gradients(p.crow_indices, p.indices, values, dy, p.columns),
        "written_out": lambda rows: (rows.written_out(p.crow_indices, p.indices, values, p.columns),),
        "dense_dots": lambda rows: (rows.dense_dots(p.crow_indices, p.indices, dy, weight),),
        **{product.field: partial(_run_drawn, product, p, product.draw(p, draw)) for product in PRODUCTS[-3:]},
        "counts": lambda rows: (rows.counts(p.indices, p.columns),),
        "topk": lambda rows: rows.topk(x, 20),
        "batch_topk": lambda rows: rows.batch_topk(x, 900),
        "above": lambda rows: rows.above(x, x.new_ones(x.shape[1])),
        "encode_topk": lambda rows: rows.encode_topk(*encoder.values(), 9),
    }


def _run_drawn(product: RowProduct, p: RowProblem, operands: Operands, rows: RowProducts) -> Result:
    return (product.run(rows, p, operands),)


def _with_threads(counts: tuple[int, ...], run: Callable[[], Result]) -> list[Result]:
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(before)


def _agree(results: list[Result]) -> bool:
    return all(all(map(same_bits, result, results[0])) for result in results[1:])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_the_thread_count(dtype: torch.dtype, backend: Backend) -> None:
    calls = _calls(dtype).values()
    assert _agree(_with_threads((1, 2, 3), lambda: tuple(tensor for call in calls for tensor in call(backend.rows))))


@pytest.mark.parametrize("backend", [b for b in kernels.backends().values() if b.native], ids=lambda b: b.name)
def test_products_of_every_shape_do_not_depend_on_the_thread_count(backend: Backend) -> None:
    def run() -> Result:
        draw = gaussian(4, torch.float32)
        return tuple(
            product.run(backend.rows, problem, product.draw(problem, draw))
            for product in PRODUCTS
            if product.field != "dense_dots"  # torch's product does
            for problem in (*PROBLEMS, *LARGE_PROBLEMS)
        )

    assert _agree(_with_threads((1, 2, 3), run))


@every_backend
def test_encoders_of_every_shape_do_not_depend_on_the_thread_count(backend: Backend) -> None:
    def run() -> Result:
        draw = gaussian(4, torch.float32)
        drawn = [(problem.draw(draw), problem.k) for problem in ENCODE_PROBLEMS[::5]]
        found = [backend.rows.encode_topk(o["x"], o["weight"], o.get("bias"), k) for o, k in drawn]
        return tuple(tensor for pair in found for tensor in pair)

    assert _agree(_with_threads((1, 2, 3), run))


@every_backend
def test_forced_isa_is_the_one_that_runs(backend: Backend) -> None:
    for field, call in _calls().items():
        before = {isa: cpu.calls(isa) for isa in cpu.isas()}
        call(backend.rows)
        ran = {isa for isa in cpu.isas() if cpu.calls(isa) > before[isa]}
        expected = {backend.name.removeprefix("cpu:")} if backend.native and field in NATIVE else set()
        assert ran == expected, f"{field}: asked for {backend.name}, but {sorted(ran) or 'no native variant'} ran"


@every_backend
def test_callers_that_compute_at_once_do_not_disturb_each_other(backend: Backend) -> None:
    calls = list(_calls().values())
    expected = [call(backend.rows) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            results = pool.map(lambda call: call(backend.rows), calls)
            assert all(_agree([a, b]) for a, b in zip(results, expected, strict=True))


@every_backend
def test_rows_that_no_kernel_may_follow_are_refused(backend: Backend) -> None:
    for bad in BAD_ROWS.values():
        check_refuses(backend.rows, *bad)


@every_backend
def test_k_outside_of_what_there_is_is_refused(backend: Backend) -> None:
    x, weight, rows = torch.ones(1, 6), torch.ones(6, 6), backend.rows
    for k in (-1, 7, 2**31, 2**40):
        for call in (partial(rows.topk, x), partial(rows.batch_topk, x), partial(rows.encode_topk, x, weight, None)):
            with pytest.raises(KernelError, match=f"got {k}"):
                call(k)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_numbers_are_not_taken_for_zero(dtype: torch.dtype, backend: Backend) -> None:
    """Not in bfloat16: the instruction that multiplies its pairs takes them for zero."""
    for product in PRODUCTS:
        if product.field != "dots":
            check_with(product, backend.rows, PROBLEM, dtype, subnormals)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (2, 5000)], ids=str)
def test_zeros_are_chosen_where_the_processor_flushes_subnormal_numbers(
    shape: tuple[int, int], dtype: torch.dtype, backend: Backend, one_thread: None
) -> None:
    """Nothing normal lies just below zero; the bound on the k-th largest must let zeros pass all the same."""
    x = gaussian(5, dtype)(shape).relu()
    x[:, 5:] = 0
    expected = DEFINITION.topk(x, 20)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        found = backend.rows.topk(x, 20)
    finally:
        torch.set_flush_denormal(False)
    assert all(map(same_bits, found, expected))


STRIDED = {
    # Which vector is a view: (crow_indices, indices, values); "one number" is what the backward pass of `sum()` gives.
    ("crow_indices", "with steps"): ([0, 2, 3], [1, 0, 1], [2.0, 3.0, 5.0]),
    ("indices", "with steps"): ([0, 2, 3], [1, 0, 1], [2.0, 3.0, 5.0]),
    ("values", "with steps"): ([0, 2, 3], [1, 0, 1], [2.0, 3.0, 5.0]),
    ("crow_indices", "one number"): ([0, 0, 0], [], []),
    ("indices", "one number"): ([0, 2, 3], [1, 1, 1], [2.0, 3.0, 5.0]),
    ("values", "one number"): ([0, 2, 3], [1, 0, 1], [2.0, 2.0, 2.0]),
}


@every_backend
@pytest.mark.parametrize(("which", "layout"), STRIDED)
def test_vectors_with_strides_are_read_as_they_lie_or_refused(which: str, layout: str, backend: Backend) -> None:
    crow_indices, indices, values = STRIDED[which, layout]
    vectors = {
        "crow_indices": torch.tensor(crow_indices, dtype=torch.int32),
        "indices": torch.tensor(indices, dtype=torch.int32),
        "values": torch.tensor(values),
    }
    vector = vectors[which]
    view = vector[:1].expand(3) if layout == "one number" else torch.stack([vector, vector + 1], 1)[:, 0]
    assert torch.equal(view, vector) and not view.is_contiguous()
    weight, dy = torch.tensor([[1.0, 10.0], [7.0, 70.0]]), torch.tensor([[1.0, 2.0], [-1.0, 4.0]])

    def results(crow_indices: Tensor, indices: Tensor, values: Tensor) -> list[Callable[[], Tensor]]:
        return [
            lambda: backend.rows.matmul(crow_indices, indices, values, weight),
            lambda: backend.rows.dots(crow_indices, indices, dy, weight),
            lambda: backend.rows.weight_gradient(crow_indices, indices, values, dy, 2),
            lambda: backend.rows.counts(indices, 2),
        ]

    for expected, strided in zip(results(**vectors), results(**(vectors | {which: view})), strict=True):
        try:
            result = strided()
        except KernelError:
            continue
        assert torch.equal(result, expected())


@every_backend
@pytest.mark.parametrize("layout", ["transposed", "every other", "a slice"])
def test_a_buffer_with_strides_is_written_where_it_lies_or_refused(layout: str, backend: Backend) -> None:
    p, draw = PROBLEM, small_integers(8, torch.float32)
    values, dy = draw(p.indices.shape), draw((p.rows, p.width))
    whole = draw((2 * (p.columns + p.width), 2 * (p.columns + p.width)))
    before = whole.clone()

    def view(of: Tensor) -> Tensor:
        return {
            "transposed": of[: p.width, : p.columns].t(),
            "every other": of[::2, ::2][: p.columns, : p.width],
            "a slice": of[3 : 3 + p.columns, 1 : 1 + p.width],
        }[layout]

    expected = before.clone()
    view(expected).add_(DEFINITION.weight_gradient(p.crow_indices, p.indices, values, dy, p.columns))
    try:
        backend.rows.add_weight_gradient(p.crow_indices, p.indices, values, dy, view(whole))
    except KernelError:
        assert torch.equal(whole, before)
    else:
        assert torch.equal(whole, expected)


@every_backend
def test_a_buffer_that_is_also_added_to_itself_is_written_or_refused(backend: Backend) -> None:
    crow_indices, indices = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    values, buffer = torch.tensor([2.0, 9.0, 2.0, 9.0])[::2], torch.ones(2, 6)[:, :4]
    try:
        backend.rows.add_weight_gradient(crow_indices, indices, values, buffer, buffer)
    except KernelError:
        assert torch.equal(buffer, torch.ones(2, 4))
    else:
        assert torch.equal(buffer, torch.full((2, 4), 3.0))


@every_backend
def test_a_bias_with_steps_gives_the_same_entries(backend: Backend) -> None:
    operands = ENCODE_PROBLEMS[0].draw(gaussian(7, torch.float32))
    x, weight, bias = operands["x"], operands["weight"], gaussian(8, torch.float32)((operands["weight"].shape[0],))
    expected = DEFINITION.encode_topk(x, weight, bias, 2)
    found = backend.rows.encode_topk(x, weight, torch.stack([bias, bias + 1], 1)[:, 0], 2)
    assert torch.equal(found[1], expected[1])


@every_backend
def test_a_buffer_whose_rows_lie_on_one_another_is_refused(backend: Backend) -> None:
    p, whole = PROBLEM, torch.ones(1, PROBLEM.width)
    values, dy = torch.ones(p.indices.shape), torch.ones(p.rows, p.width)
    with pytest.raises((KernelError, RuntimeError)):
        backend.rows.add_weight_gradient(p.crow_indices, p.indices, values, dy, whole.expand(p.columns, p.width))
    assert torch.equal(whole, torch.ones(1, p.width))


@every_backend
@pytest.mark.parametrize("layout", ["transposed", "every other", "a slice", "expanded"])
def test_scores_with_any_strides_give_the_same_entries(layout: str, backend: Backend) -> None:
    for shape in ((3, 5), (9, 70), (2, 700)):
        x = scores("some NaN and infinities", shape, torch.float32)
        if layout == "expanded":
            x = x[:1].expand(shape).contiguous()
        wide = torch.full((2 * shape[0] + 2, 2 * shape[1] + 2), 100.0)
        view = {
            "transposed": lambda x=x: x.t().contiguous().t(),
            "every other": lambda wide=wide, shape=shape: wide[: 2 * shape[0] : 2, : 2 * shape[1] : 2],
            "a slice": lambda wide=wide, shape=shape: wide[1 : 1 + shape[0], 1 : 1 + shape[1]],
            "expanded": lambda x=x, shape=shape: x[:1].expand(shape),
        }[layout]()
        if layout in ("every other", "a slice"):
            view.copy_(x)
        for selection, of in (("topk", 4), ("batch_topk", 4), ("above", x.new_ones(shape[1]))):
            expected = getattr(DEFINITION, selection)(x, of)
            assert all(map(same_bits, getattr(backend.rows, selection)(view, of), expected))


def _freed_slice() -> Tensor:
    whole = torch.ones(2, 12)
    scores = whole[:, :6]
    whole.untyped_storage().resize_(0)
    return scores


def _misfits() -> dict[str, Callable[[RowProducts], object]]:
    crow, indices = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)
    values, weight, dy, x = torch.ones(3), torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 6)
    rows, two = (crow, indices), torch.ones(2)
    sparse = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    return {
        "weight of another dtype": lambda r: r.matmul(crow, indices, values, weight.double()),
        "values of half": lambda r: r.matmul(crow, indices, values.half(), weight.half()),
        "values too few": lambda r: r.matmul(crow, indices, values[:2], weight),
        "values too many": lambda r: r.matmul(crow, indices, torch.ones(4), weight),
        "indices of 64 bits": lambda r: r.matmul(crow, indices.long(), values, weight),
        "crow_indices of 64 bits": lambda r: r.matmul(crow.long(), indices, values, weight),
        "no crow_indices": lambda r: r.matmul(crow[:0], indices, values, weight),
        "weight of one dimension": lambda r: r.matmul(crow, indices, values, weight[:, 0]),
        "weight elsewhere": lambda r: r.matmul(crow, indices, values, weight.to("meta")),
        "dy of other rows": lambda r: r.dots(crow, indices, dy[:1], weight),
        "dy of another width": lambda r: r.dots(crow, indices, dy[:, :3], weight),
        "dy of another dtype": lambda r: r.dots(crow, indices, dy.double(), weight),
        "dy of fewer rows": lambda r: r.weight_gradient(crow, indices, values, dy[:1], 2),
        "dy of doubles": lambda r: r.weight_gradient(crow, indices, values, dy.double(), 2),
        "buffer of doubles": lambda r: r.add_weight_gradient(crow, indices, values, dy, weight.double()),
        "buffer of another width": lambda r: r.add_weight_gradient(
            crow, indices, values, dy, weight[:, :3].contiguous()
        ),
        "encoder's dy of fewer rows": lambda r: r.encoder_gradients(crow, indices, values, dy[:1], 2),
        "encoder's values too few": lambda r: r.encoder_gradients(crow, indices, values[:2], dy, 2),
        "values too few to write out": lambda r: r.written_out(crow, indices, values[:2], 2),
        "values of half to write out": lambda r: r.written_out(crow, indices, values.half(), 2),
        "dense dy of other rows": lambda r: r.dense_dots(crow, indices, dy[:1], weight),
        "dense dy of another width": lambda r: r.dense_dots(crow, indices, dy[:, :3], weight),
        "dense dy of doubles": lambda r: r.dense_dots(crow, indices, dy.double(), weight),
        "sparse weight of doubles": lambda r: r.sparse_matmul(*rows, values, *sparse, two.double(), 4),
        "sparse weight too short": lambda r: r.sparse_matmul(*rows, values, *sparse, two[:1], 4),
        "sparse weight of half": lambda r: r.sparse_matmul(*rows, values.half(), *sparse, two.half(), 4),
        "values too few for a sparse weight": lambda r: r.sparse_matmul(*rows, values[:2], *sparse, two, 4),
        "sparse dy of other rows": lambda r: r.sparse_dots(*rows, dy[:1], *sparse, two),
        "sparse dy of doubles": lambda r: r.sparse_dots(*rows, dy.double(), *sparse, two),
        "sparse gradient of fewer rows": lambda r: r.sparse_weight_gradient(*rows, values, dy[:1], *sparse),
        "sparse gradient of doubles": lambda r: r.sparse_weight_gradient(*rows, values, dy.double(), *sparse),
        "64-bit counts": lambda r: r.counts(indices.long(), 2),
        "half scores": lambda r: r.topk(x.half(), 2),
        "scores of one dimension": lambda r: r.topk(x[0], 2),
        "half scores of a batch": lambda r: r.batch_topk(x.half(), 2),
        "thresholds too few": lambda r: r.above(x, torch.ones(5)),
        "thresholds of doubles": lambda r: r.above(x, torch.ones(6).double()),
        "weight too narrow": lambda r: r.encode_topk(x, torch.ones(9, 5), None, 2),
        "bias too short": lambda r: r.encode_topk(x, torch.ones(9, 6), torch.ones(8), 2),
        "sparse scores": lambda r: r.topk(x.to_sparse(), 2),
        "freed values": lambda r: r.matmul(crow, indices, freed(values), weight),
        "a freed weight, transposed": lambda r: r.matmul(crow, indices, values, freed(torch.ones(4, 2).t())),
        "a freed slice of scores": lambda r: r.above(_freed_slice(), None),
        "a freed slice of a batch's scores": lambda r: r.batch_topk(_freed_slice(), 2),
        "freed indices": lambda r: r.counts(freed(indices), 2),
        "bias of doubles": lambda r: r.encode_topk(x, torch.ones(9, 6), torch.ones(9).double(), 2),
    }


@pytest.mark.parametrize("name", NATIVE_NAMES)
def test_operands_that_do_not_fit_are_refused_by_the_native_kernels(name: str) -> None:
    taken = []
    for misfit, call in _misfits().items():
        try:
            call(kernels.backends()[name].rows)
            taken.append(misfit)
        except KernelError as error:
            assert "got" in str(error)
    assert taken == []
