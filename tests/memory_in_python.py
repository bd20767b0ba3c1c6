"""Kernels that touch what they must not, run in Python as in `triton_in_python.py`: `watched_memory.py` sees it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels import KernelError
from offpath.kernels.gpu import counting_sort, densely, expand, few_tokens, gather, launch, sparse_weight, ties
from row_cases import BAD_ROWS
from triton_in_python import mutated

OUTSIDE, RACE, ORDER, TWICE = "outside of its", "another one has written", "another one has read", "to the same place"
ROWS = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 2, 2, 1, 0], dtype=torch.int32)
COLUMNS, WIDTH = 3, 600  # not a whole number of blocks, and several of them


def _values() -> Tensor:
    return torch.ones(5)


def _dense(rows: int, columns: int = WIDTH) -> Tensor:
    return torch.ones(rows, columns)


CALLS: dict[ModuleType, Callable[[ModuleType], object]] = {
    gather: lambda m: (m.matmul(*ROWS, _values(), _dense(COLUMNS)), m.dots(*ROWS, _dense(2), _dense(COLUMNS))),
    counting_sort: lambda m: (
        m.encoder_gradients(*ROWS, _values(), _dense(2), COLUMNS),
        m.row_gradients(*ROWS, _values(), _dense(2), _dense(COLUMNS)),
        m.add_weight_gradient(*ROWS, _values(), _dense(2), _dense(COLUMNS)),
    ),
    densely: lambda m: m.written_out(*ROWS, _values(), COLUMNS),
    few_tokens: lambda m: (
        m.spmm_of_few(*ROWS, _values(), _dense(9, COLUMNS), None),
        m.sddmm_of_few(*ROWS, _dense(9, 2), _dense(9, COLUMNS)),
    ),
    sparse_weight: lambda m: m.transpose(_dense(70, 3), torch.empty(3, 80)),
    expand: lambda m: m.compress(m.bitmap(*ROWS, 9), m.expand(m.bitmap(*ROWS, 9), _values())),
    ties: lambda m: m.take_first_of_equals(_dense(2, 40), _dense(2, 5), torch.zeros(2, 4, dtype=torch.int64)),
}

# Mistakes in the source: (module, what stands there, what stands there instead, what is seen).
MUTANTS = {
    "a row's place past its width is read": (
        gather,
        "mask=place < width, other",
        "mask=place <= width, other",
        OUTSIDE,
    ),
    "and written": (gather, "mask=None if WHOLE else place < width", "mask=None", f"{RACE}|{OUTSIDE}"),
    "an entry past the last one": (gather, "crow_indices + row + 1)", "crow_indices + row + 2)", OUTSIDE),
    "every block of rows is the first": (gather, "y + row.to(tl.int64) * y_stride", "y", RACE),
    "blocks of a dot share a place": (gather, "dots + block.to(tl.int64) * nnz", "dots", RACE),
    "every block writes the totals": (counting_sort, "if TOTALS and block == 0:", "if TOTALS:", RACE),
    "the gradient of the next row is read": (
        counting_sort,
        "sums += load_part(target,",
        "sums += load_part(gradient + (name + 1) % 3 * gradient_stride,",
        RACE + "|" + ORDER + "|reads what a program has",
    ),
    "a row of dy too many": (counting_sort, "dy + row * dy_stride", "dy + (row + 1) * dy_stride", OUTSIDE),
    "neighbours at one place all write": (densely, "inside & (place != before)", "inside", TWICE),
    "a place past the last one": (densely, "+ position, mask=inside,", "+ position, mask=position <= nnz,", OUTSIDE),
    "slots past the last row": (few_tokens, "live = slot < end\n", "live = slot < end + 1\n", OUTSIDE),
    "a token too many": (few_tokens, "mask=token < tokens)", "mask=token <= tokens)", OUTSIDE),
    "a row of padding": (sparse_weight, "(row < padded)[None, :]", "(row <= padded)[None, :]", OUTSIDE),
    "a row too many": (sparse_weight, "(row < rows)[:, None]", "(row <= rows)[:, None]", OUTSIDE),
    "a column past the last one": (expand, "first + tl.arange(0, 8)[None, :] < columns", "first < columns", OUTSIDE),
    "a row past the last one": (expand, "(word < words_of_row) & (row < rows)", "(word < words_of_row)", OUTSIDE),
    "behind the last score": (ties, "mask=inside, other=0.0)", "mask=column <= columns, other=0.0)", OUTSIDE),
    "another row's place": (ties, "places + row * k +", "places +", RACE),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name: str, tmp_path: Path) -> None:
    module, old, new, seen = MUTANTS[name]
    with pytest.raises(AssertionError, match=seen):
        CALLS[module](mutated(module, old, new, tmp_path))


@pytest.mark.parametrize("module", CALLS, ids=lambda module: module.__name__)
def test_what_is_not_mutated_touches_nothing_else(module: ModuleType) -> None:
    CALLS[module](module)


@triton.jit
def _adds_up(source, target):
    tl.store(target, tl.load(target) + tl.load(source + tl.program_id(0)))


@triton.jit
def _reads_again(source, target):
    tl.store(target, tl.load(source))
    tl.store(source, tl.load(target))


@triton.jit
def _by_atomics(source, target):
    tl.atomic_add(target, tl.load(source + tl.program_id(0)))


@pytest.mark.parametrize(
    ("kernel", "seen"),
    [
        (_adds_up, f"reads what a program|{ORDER}"),
        (_reads_again, f"reads what a program|{RACE}"),
        (_by_atomics, "atom"),
    ],
    ids=lambda of: of if isinstance(of, str) else of.fn.__name__,
)
def test_a_kernel_that_depends_on_an_order_is_seen(kernel: triton.runtime.JITFunction, seen: str) -> None:
    with pytest.raises(AssertionError, match=seen):
        launch.launch(kernel, (2,), torch.ones(2), torch.zeros(1), num_warps=1)


def test_the_gaps_of_a_view_are_no_operand() -> None:
    whole = torch.ones(4, 6)
    gather.gather_sum(*ROWS, _values(), whole[:COLUMNS, :5], torch.empty(2, 8)[:, :5])
    with pytest.raises(AssertionError, match=OUTSIDE):
        gather.gather_sum(*ROWS, _values(), whole[:COLUMNS, ::2], torch.empty(2, 3))


UNORDERED = [name for name in BAD_ROWS if not name.startswith("index")]


def _check_unordered(name: str, gathering: ModuleType, sorting: ModuleType, writing: ModuleType) -> None:
    """Some are refused for their shape; of others, the product says NaN."""
    crow_indices, indices, columns = BAD_ROWS[name]
    rows = crow_indices, indices
    values, dy, weight = torch.ones(indices.shape[0]), _dense(crow_indices.shape[0] - 1), _dense(columns)
    if name in ("an entry, no columns", "entries without rows"):
        with pytest.raises(KernelError, match="expected crow_indices"):
            gathering.matmul(*rows, values, weight)
        return
    assert gathering.matmul(*rows, values, weight).isnan().any()
    sorting.encoder_gradients(*rows, values, dy, columns)
    sorting.row_gradients(*rows, values, dy, weight)
    writing.written_out(*rows, values, columns)
    writing.dense_dots(*rows, dy, weight)
    with pytest.raises(AssertionError, match=RACE) if name == "falls" else nullcontext():  # two rows have one entry
        gathering.dots(*rows, dy, weight)


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "check_rows", lambda *_: None)  # as on a GPU


@pytest.mark.parametrize("name", UNORDERED)
def test_rows_that_do_not_follow_on_lead_to_no_other_memory(nobody_looks: None, name: str) -> None:
    _check_unordered(name, gather, counting_sort, densely)


@pytest.mark.parametrize(
    ("place", "old", "new"),
    [
        (0, "& (end <= nnz)", ""),
        (0, "(begin >= 0) & ", ""),
        (1, "row = tl.where(in_row, row, 0)", "row = row * 1"),
        (2, "clamp_(0, rows - 1)", "clamp_(0, rows)"),
        (2, "clamp_(0, rows - 1)", "clamp_(-1, rows - 1)"),
    ],
)
def test_a_mutant_that_follows_them_is_seen(nobody_looks: None, place: int, old: str, new: str, tmp_path: Path) -> None:
    modules = [gather, counting_sort, densely]
    modules[place] = mutated(modules[place], old, new, tmp_path)
    with pytest.raises(AssertionError, match=OUTSIDE):
        for name in UNORDERED:
            _check_unordered(name, *modules)
