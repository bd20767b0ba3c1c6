"""The Triton kernels, run in Python on CPU tensors: what `test_triton.py` starts in a process of its own.

Triton reads TRITON_INTERPRET once, when it is imported. Its interpreter is exact but for two things: programs run one
after another, so no race shows, and a cast to bfloat16 cuts the bits off instead of rounding.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import checkers
import row_checkers
import watched_memory
from cases import PRODUCTS
from offpath import pattern as patterns
from offpath.kernels import Backend, KernelError, reference, reference_rows
from offpath.kernels.gpu import counting_sort, densely, expand, few_tokens, gather, launch, sparse_weight
from offpath.kernels.gpu.gather import named_row
from offpath.kernels.row_products import RowProducts
from problems import PROBLEMS, WIDTHS, Problem
from row_cases import (
    BAD_ROWS,
    PROBLEMS as ROW_CASES,
    PRODUCTS as ROW_PRODUCTS,
    PRODUCTS_OF_VIEWS,
    RowProduct,
    _problem,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of a NaN


_prepared: set[str] = set()


def _call_within_a_kernel(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """Prepares triton.language once for each module, not in every call: that is most of an interpreter's time."""
    module = function.fn.__globals__["__name__"]
    if module not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(module)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_within_a_kernel
watched_memory.watch()

COMPILED = isinstance(gather.gather_sum_kernel, triton.runtime.JITFunction)  # see compiled_on_cpu.py
every_dtype = pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)
OURS = ("spmm", "sddmm", "expand", "compress")
ROWS_OURS = ("matmul", "dots", "weight_gradient", "add_weight_gradient")
# Interpreting costs a millisecond for each entry of each block, so problems are few and small.
PATTERNS = {problem.name: problem for problem in (*PROBLEMS, *WIDTHS)}
SMALL = [
    PATTERNS[name]
    for name in ("rows of one to eight connections", "batch of 5", "batch of 16", "one row", "one column")
]
FEW = [
    *(replace(SMALL[0], name=f"{batch} tokens", batch=batch) for batch in (1, 2, 9, 15)),
    Problem("rows of more slots than a block", lambda: patterns.full((2, 150)), 3),
]
EMPTY = [PATTERNS[name] for name in ("no connections", "no rows", "no columns", "empty batch")]
WIDE = Problem("columns in several words, the last one cut", lambda: patterns.from_mask(torch.eye(70)[:3] > 0), 1)
# Rows for: an unrolled loop and its rest, blocks that are whole, cut, and several.
ROW_PROBLEMS = [
    _problem("rows of none to 17 entries", [0, 1, 7, 9, 0, 17], 30, 33),
    _problem("a whole block", [3, 9], 12, 512),
    _problem("several blocks, the last one cut", [1, 9], 12, 264),
    _problem("several blocks of a dot", [1, 2], 3, 520),
    _problem("a column that every row names", [1] * 20, 5, 19, lambda counts, n, _: torch.full((sum(counts),), n - 1)),
]
EMPTY_ROWS = [
    _problem("no entries", [0] * 3, 7, 9),
    _problem("no rows", [], 7, 9),
    _problem("no columns", [0] * 4, 0, 9),
    _problem("no width", [2] * 4, 7, 0),
]


def rows_of(gathering: ModuleType, sorting: ModuleType) -> RowProducts:
    return replace(
        reference_rows.ROWS,
        matmul=gathering.matmul,
        dots=gathering.dots,
        weight_gradient=sorting.weight_gradient,
        add_weight_gradient=sorting.add_weight_gradient,
        counts=sorting.counts,
    )


def backend_of(weights: ModuleType, bitmaps: ModuleType) -> Backend:
    return replace(
        reference.BACKEND,
        name="triton",
        spmm=weights.spmm,
        sddmm=weights.sddmm,
        bitmap=bitmaps.bitmap,
        expand=bitmaps.expand,
        compress=bitmaps.compress,
    )


BACKEND, ROWS = backend_of(sparse_weight, expand), rows_of(gather, counting_sort)


def of_rows(products: tuple[RowProduct, ...]) -> list[RowProduct]:
    return [product for product in products if product.field in ROWS_OURS]


@pytest.fixture(autouse=True)
def casts_to_bfloat16_cut_bits_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def unit(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps / (1 if dtype is torch.bfloat16 and not COMPILED else 2)

    monkeypatch.setattr(row_checkers, "unit_roundoff", unit)
    monkeypatch.setattr(checkers, "unit_roundoff", unit)


def test_kernels_run_in_python(request: pytest.FixtureRequest) -> None:
    assert launch.INTERPRETED and request.config.pluginmanager.has_plugin("compiled_on_cpu") == COMPILED


@every_dtype
def test_products(dtype: torch.dtype) -> None:
    for product in PRODUCTS:
        if product.name.split()[0] in OURS:
            for problem in (*SMALL, *FEW, *EMPTY, WIDE) if dtype is torch.float32 else (*SMALL[:2], FEW[2], EMPTY[-1]):
                checkers.check_exact(product, BACKEND, problem, dtype)
            checkers.check_bounded(product, BACKEND, SMALL[0], dtype)


@every_dtype
def test_products_of_rows(dtype: torch.dtype) -> None:
    for product in of_rows(ROW_PRODUCTS):
        for problem in (*ROW_PROBLEMS, *EMPTY_ROWS):
            row_checkers.check_exact(product, ROWS, problem, dtype)
        row_checkers.check_bounded(product, ROWS, ROW_PROBLEMS[0], dtype)
    for problem in (*ROW_PROBLEMS[::4], *EMPTY_ROWS):
        row_checkers.check_counts(ROWS, problem)
        row_checkers.check_untouched(ROWS, problem, dtype)


def test_views() -> None:
    for product in of_rows(PRODUCTS_OF_VIEWS):
        if not product.name.endswith(("every other", "one row repeated")):
            row_checkers.check_exact(product, ROWS, _problem("views", [2, 0, 1], 5, 9), torch.bfloat16)


def test_nan_and_infinities_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_checkers, "SPECIAL_PROBLEMS", ROW_PROBLEMS[:1])
    row_checkers.check_special(ROWS, torch.float32)


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused(bad: tuple) -> None:
    row_checkers.check_refuses(ROWS, *bad)


def _check_densely(module: ModuleType) -> None:
    several_times = next(case for case in ROW_CASES if case.name == "in any order, several times")
    for problem in (*ROW_PROBLEMS, *EMPTY_ROWS, several_times):
        draw = row_checkers.small_integers(4, torch.float32)
        rows, values = (problem.crow_indices, problem.indices), draw(problem.indices.shape)
        weight, dy = draw((problem.columns, problem.width)), draw((problem.rows, problem.width))
        with checkers.poisoned_memory():
            dense, dots = module.written_out(*rows, values, problem.columns), module.dense_dots(*rows, dy, weight)
        place = _row_of_each(problem.crow_indices), problem.indices.long()
        right = torch.zeros(problem.rows, problem.columns).index_put_(place, values, accumulate=True)
        assert torch.equal(dense, right) and torch.equal(dots, reference_rows.dots(*rows, dy, weight)), problem.name


def _row_of_each(crow_indices: torch.Tensor) -> torch.Tensor:
    return torch.arange(crow_indices.shape[0] - 1).repeat_interleave(crow_indices.diff())


@pytest.mark.parametrize("block", [32, densely.BLOCK])
def test_rows_with_their_zeros(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densely, "BLOCK", block)
    _check_densely(densely)
    half = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)
    few = torch.tensor([1.0, 3.0, 5 * 2**-9], dtype=torch.bfloat16)
    assert densely.written_out(*half, few, 2).tolist() == [[3.0, 1 + 2**-7]]


def test_an_index_out_of_range_becomes_nan_where_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking would mean to wait."""
    for module in (gather, counting_sort, sparse_weight, densely):
        monkeypatch.setattr(module, "expect_rows", lambda *_: None)
    crow_indices = torch.tensor([0, 2, 4], dtype=torch.int32)
    indices = torch.tensor([0, 1, 2**31 - 1, -5], dtype=torch.int32)
    weight, dy, ones = torch.ones(3, 8), torch.ones(2, 8), torch.ones(4)
    y = gather.matmul(crow_indices, indices, ones, weight)
    assert torch.equal(y[0], torch.full((8,), 2.0)) and bool(y[1].isnan().all())
    both, _ = counting_sort.row_gradients(crow_indices, indices, ones, dy, weight)
    dense = densely.written_out(crow_indices, indices, ones, 3)
    assert dense[0].tolist() == [1, 1, 0] and bool((dense[1:] @ weight).isnan().all())
    for dots in (
        gather.dots(crow_indices, indices, dy, weight),
        densely.dense_dots(crow_indices, indices, dy, weight),
        both,
    ):
        assert dots[:2].tolist() == [8, 8] and bool(dots[2:].isnan().all())
    few = torch.ones(3, 2)
    assert sparse_weight.spmm(crow_indices, indices, ones, few).isnan().tolist() == [[False, True]] * 3
    dots = sparse_weight.sddmm(crow_indices, indices, few, few)
    assert dots[:2].tolist() == [3, 3] and bool(dots[2:].isnan().all())


@triton.jit
def _where_a_row_begins(weight, begins, index, stride):
    _, row = named_row(weight, tl.load(index), 2**31 - 1, stride, False)
    tl.store(begins, row.to(tl.int64) - weight.to(tl.int64))


def test_rows_past_2_to_the_31_are_found() -> None:
    """The interpreter wraps whole numbers like a GPU; a stride that no memory holds shows it in one element."""
    weight, begins = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    index = torch.tensor([2**31 - 2], dtype=torch.int32)
    launch.launch(_where_a_row_begins, (1,), weight, begins, index, 2**20, num_warps=1)
    assert int(begins) == 4 * (2**31 - 2) * 2**20


@pytest.mark.parametrize(
    "call",
    [
        lambda: gather.matmul(*_rows(), torch.ones(2, dtype=torch.float16), torch.ones(3, 4, dtype=torch.float16)),
        lambda: gather.matmul(*_rows(), torch.ones(2), torch.ones(3, 4).double()),
        lambda: gather.matmul(*_rows(), torch.ones(3), torch.ones(3, 4)),
        lambda: gather.dots(*_rows(), torch.ones(1, 5), torch.ones(3, 4)),
        lambda: gather.dots(_rows()[0], _rows()[1].long(), torch.ones(1, 4), torch.ones(3, 4)),
        lambda: counting_sort.weight_gradient(*_rows(), torch.ones(2), torch.ones(2, 4), 3),
        lambda: counting_sort.add_weight_gradient(*_rows(), torch.ones(2), torch.ones(1, 4), torch.ones(3, 5)),
        lambda: sparse_weight.spmm(*_rows(), torch.ones(2), torch.ones(4, 3).to("meta")),
        lambda: sparse_weight.spmm(*_rows(), torch.ones(2), torch.ones(4, 3), torch.ones(2)),
        lambda: sparse_weight.sddmm(*_rows(), torch.ones(4, 2), torch.ones(4, 3)),
        lambda: expand.expand(expand.bitmap(*_rows(), 3), torch.ones(3)),
        lambda: expand.compress(expand.bitmap(*_rows(), 3), torch.ones(1, 4)),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(KernelError, match="expected"):
        call()


def test_more_blocks_than_a_gpu_counts_are_refused() -> None:
    weight = torch.ones(3, 1).expand(3, 65535 * 128 + 1)
    with pytest.raises(KernelError, match="split"):
        gather.gather_sum(*_rows(), torch.ones(2), weight, torch.empty(1).expand(1, weight.shape[1]))


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)


# Mistakes in the source: (module, what stands there, what stands there instead).
MUTANTS = {
    "sum: forgets the rest of the loop": (
        gather,
        "for entry in range(unrolled, end):\n        sums",
        "if False:\n        sums",
    ),
    "sum: counts one entry twice": (
        gather,
        "            entry = first + step\n            sums",
        "            entry = first\n            sums",
    ),
    "sum: one block only": (
        gather,
        "place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "place = tl.arange(0, BLOCK)",
    ),
    "sum: in the operand's type": (gather, "ACCUMULATOR=accumulator(y.dtype),", "ACCUMULATOR=tl.float16,"),
    "sum: forgets the last place": (gather, "mask=None if WHOLE else place < width", "mask=place < width - 1"),
    "dot: row of dy off by one": (gather, "dy + row.to(tl.int64) * dy_stride", "dy + (row + 1) % 2 * dy_stride"),
    "dot: forgets blocks": (gather, "parts.sum(0)", "parts[0]"),
    "gradient: forgets names without an entry": (counting_sort, "if begin < end or not ADD:", "if begin < end:"),
    "gradient: touches names without an entry": (counting_sort, "if begin < end or not ADD:", "if begin <= end:"),
    "gradient: values in the order of the batch": (counting_sort, "values.index_select(0, by_name.entries)", "values"),
    "gradient: writes instead of adding": (counting_sort, "        if ADD:\n", "        if False:\n"),
    "counts: of the last place": (
        counting_sort,
        "torch.arange(columns + 1, dtype=torch.int32, device=indices.device)\n    return",
        "torch.arange(columns + 1, dtype=torch.int32, device=indices.device).clamp(max=columns - 1)\n    return",
    ),
    "weight: bias forgotten": (sparse_weight, "y, bias, trusted=True", "y, None, trusted=True"),
    "weight: padding in the way": (
        sparse_weight,
        "transpose(y[:, :batch], target)",
        "transpose(y[:, -batch:], target)",
    ),
    "few: forgets the last slot": (few_tokens, "live = slot < end\n", "live = slot < end - 1\n"),
    "few: one block of tokens": (few_tokens, "tl.program_id(1) * TOKENS + ", ""),
    "few: of the dots, one block of tokens": (few_tokens, "range(0, tokens, TOKENS)", "range(0, TOKENS, TOKENS)"),
    "few: of the dots, the wrong output": (few_tokens, "* dy_stride + row", "* dy_stride + row // 2"),
    "few: forgets the bias": (few_tokens, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    "densely: neighbours at one place": (densely, "position += 1", "position += nnz"),
    "densely: every entry writes": (densely, "inside & (place != before)", "inside"),
    "densely: in the wrong order": (densely, "values + entry,", "values + position,"),
    "transpose: padding not written": (sparse_weight, "mask=written", "mask=written & (row < rows)[None, :]"),
    "bits: counts itself": (expand, "earlier = spread * 0x11111111 - spread", "earlier = spread * 0x11111111"),
    "bits: forgets lower bytes": (expand, "before += ((lower", "before += 0 * ((lower"),
    "expand: zeros not written": (
        expand,
        "tl.store(target, value, mask=_inside(first, row, rows, columns, ALIGNED))",
        "tl.store(target, value, mask=live)",
    ),
    "compress: stores everything": (
        expand,
        "tl.store(values + place, value, mask=live)",
        "tl.store(values + place, value, mask=live | (place == 0))",
    ),
}


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    source = Path(module.__file__).read_text()
    assert source.count(old) >= 1, f"the source no longer has {old!r}"
    path = folder / f"{module.__name__.rsplit('.', 1)[1]}_mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = mutant
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MUTANTS[name]
    mutant = mutated(module, old, new, tmp_path)
    if module is few_tokens:
        for function in ("spmm_of_few", "sddmm_of_few"):
            monkeypatch.setattr(sparse_weight, function, getattr(mutant, function))
    with pytest.raises(AssertionError):
        if module is densely:
            _check_densely(mutant)
        elif module in (gather, counting_sort):
            _check_rows(
                rows_of(mutant if module is gather else gather, mutant if module is counting_sort else counting_sort)
            )
        else:
            _check_weights(
                backend_of(mutant if module is sparse_weight else sparse_weight, mutant if module is expand else expand)
            )


def _check_rows(rows: RowProducts) -> None:
    for product in of_rows(ROW_PRODUCTS):
        for problem in ROW_PROBLEMS:
            row_checkers.check_bounded(product, rows, problem, torch.float32)
    for problem in ROW_PROBLEMS:
        row_checkers.check_untouched(rows, problem, torch.float32)
        row_checkers.check_counts(rows, problem)


def _check_weights(backend: Backend) -> None:
    for product in PRODUCTS:
        if product.name.split()[0] in OURS:
            for problem in (SMALL[0], SMALL[1], FEW[2], WIDE):
                checkers.check_bounded(product, backend, problem, torch.float32)


def test_what_is_not_mutated_is_accepted() -> None:
    _check_rows(ROWS)
    _check_weights(BACKEND)
    _check_densely(densely)
