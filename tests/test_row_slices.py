"""Parts of sparse rows, several put together, and their other forms: what the dense matrix gives."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from copy import copy, deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from checkers import assert_same
from offpath import SparseLinear, SparseRows
from offpath.kernels import KernelError
from offpath.nn import SparseConv1d, SparseSparseLinear, TopK

DENSE = torch.tensor(
    [[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 7.0, 0.0], [8.0, 0.0, 0.0, 9.0]],
    dtype=torch.float64,
)
ROWS = SparseRows.from_dense(DENSE)
# In no order, one of them twice.
MIXED = SparseRows(torch.tensor([0, 3, 4]).int(), torch.tensor([2, 0, 2, 1]).int(), torch.arange(1.0, 5.0), 3)

bounds = st.none() | st.integers(-7, 7)


@given(st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3)))
def test_a_slice_is_that_of_the_dense_matrix(part: slice) -> None:
    assert torch.equal(ROWS[part].to_dense(), DENSE[part])


@given(st.lists(st.integers(-5, 4)))
def test_rows_in_any_order_and_as_often_as_wanted(numbers: list[int]) -> None:
    right = DENSE[torch.tensor(numbers, dtype=torch.int64)]
    for given_as in (numbers, torch.tensor(numbers, dtype=torch.int32)):
        assert torch.equal(ROWS[given_as].to_dense(), right)


@given(st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mask_of_the_rows(mask: list[bool]) -> None:
    assert torch.equal(ROWS[torch.tensor(mask)].to_dense(), DENSE[torch.tensor(mask)])


def test_slices_from_behind_are_those_of_numpy() -> None:
    assert torch.equal(ROWS[::-1].to_dense(), DENSE.flip(0)) and torch.equal(ROWS[3:0:-2].to_dense(), DENSE[[3, 1]])


def test_entries_keep_their_order() -> None:
    part = MIXED[[1, 0, 0]]
    assert part.indices.tolist() == [1, 2, 0, 2, 2, 0, 2] and part.values.tolist() == [4, 1, 2, 3, 1, 2, 3]
    assert torch.equal(MIXED[:1].indices, MIXED.indices[:3]) and len(MIXED) == 2 and len(MIXED[:0]) == 0


def test_numpy_says_which_rows_forwards_and_backwards() -> None:
    order = np.argsort(DENSE.sum(1).numpy())
    assert torch.equal(ROWS[order[::-1]].to_dense(), DENSE[torch.from_numpy(order[::-1].copy())])
    assert torch.equal(ROWS[DENSE[:, 0].numpy() > 0].to_dense(), DENSE[DENSE[:, 0] > 0])


def test_a_slice_shares_memory_and_copies_are_copies() -> None:
    values = ROWS.values.clone()
    rows = ROWS.with_values(values)
    rows[2:3].values[0] = 30.0
    assert values[2] == 30.0
    copy = rows.to(copy=True)
    for part in ("crow_indices", "indices", "values"):
        assert getattr(copy, part).data_ptr() != getattr(rows, part).data_ptr()


def test_gradients_go_to_where_the_entries_were() -> None:
    dense = DENSE.clone().requires_grad_()
    rows = SparseRows.from_dense(dense)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    together = SparseRows.cat([rows[3:], rows[[2, 2]]])
    (gradient,) = torch.autograd.grad((together @ weights).sum(), dense)
    right = torch.zeros_like(DENSE)
    right[3:], right[2] = weights.T, 2 * weights.T
    assert torch.equal(gradient, right * (DENSE != 0))


def test_parts_put_together_are_the_whole() -> None:
    whole = SparseRows.cat([ROWS[:2], ROWS[2:2], ROWS[2:]])
    assert torch.equal(whole.crow_indices, ROWS.crow_indices) and torch.equal(whole.indices, ROWS.indices)
    assert torch.equal(whole.values, ROWS.values) and whole.shape == ROWS.shape
    assert len(SparseRows.cat([ROWS[:0]])) == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_of_torch_and_back() -> None:
    values = ROWS.values.clone().requires_grad_()
    csr = ROWS.with_values(values).to_sparse_csr()
    torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), values.detach(), DENSE.shape, check_invariants=True)
    assert torch.equal(csr.to_dense(), DENSE)
    back = SparseRows.from_sparse_csr(csr)
    assert torch.equal(back.to_dense(), DENSE) and back.indices.dtype is torch.int32
    (gradient,) = torch.autograd.grad((back.values * torch.arange(9)).sum(), values)
    assert gradient.tolist() == list(range(9))
    for empty in (torch.zeros(0, 3), torch.zeros(2, 3)):
        assert torch.equal(SparseRows.from_dense(empty).to_sparse_csr().to_dense(), empty)


def test_what_was_saved_is_loaded_without_trust() -> None:
    """`torch.load` reads weights only unless it is told otherwise."""
    file = io.BytesIO()
    torch.save({"latents": ROWS}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["latents"]
    assert isinstance(loaded, SparseRows) and torch.equal(loaded.to_dense(), DENSE)


def test_to_takes_what_a_tensor_takes() -> None:
    moved = ROWS.to(device="meta", dtype=torch.float32)
    assert moved.device.type == moved.indices.device.type == moved.crow_indices.device.type == "meta"
    assert moved.dtype is torch.float32 and ROWS.to(torch.ones(1)).dtype is torch.float32
    assert ROWS.to(torch.float64) is ROWS and ROWS.to("cpu") is ROWS and ROWS.to(torch.float32).indices is ROWS.indices


HUGE = torch.zeros(1).expand(2**30)  # one number in memory
# Of three entries: row pointers that lead elsewhere, the last by steps that int32 takes for positive ones.
POINTERS = [0, 100, 3], [0, 10**6, 3], [1, 2, 3], [0, 1, 2], [-2, 0, 3], [0, 2**31 - 1, -(2**31), -1, 3]
LEADING: dict[str, Callable[[SparseRows], object]] = {
    "slice": lambda rows: rows[:],
    "numbers": lambda rows: rows[[0, 1]],
    "mask": lambda rows: rows[torch.ones(len(rows), dtype=torch.bool)],
    "backwards": lambda rows: rows[::-1],
    "cat": lambda rows: SparseRows.cat([rows, rows]),
    "row_indices": lambda rows: rows.row_indices(),
    "to_dense": lambda rows: rows.to_dense(),
    "to_sparse_csr": lambda rows: rows.to_sparse_csr(),
    "product": lambda rows: rows @ torch.ones(3, 2),
}
REFUSED: dict[str, Callable[[], object]] = {
    "one row": lambda: ROWS[0],
    "one entry": lambda: ROWS[1, 2],
    "a column": lambda: ROWS[:, 2],
    "a name": lambda: ROWS["a"],
    "numbers of different lengths": lambda: ROWS[[[0], [1, 2]]],
    "objects": lambda: ROWS[np.array([object()])],
    "a number beyond": lambda: ROWS[[0, 5]],
    "a number before": lambda: ROWS[[-6]],
    "a mask of other rows": lambda: ROWS[torch.ones(4, dtype=torch.bool)],
    "numbers that are none": lambda: ROWS[torch.ones(2)],
    "a table of numbers": lambda: ROWS[torch.ones(2, 2).long()],
    "too many entries": lambda: SparseRows(
        torch.tensor([0, 2**20]).int(), torch.zeros(2**20).int(), torch.zeros(2**20), 1
    )[torch.zeros(2**11).long()],
    "nothing to put together": lambda: SparseRows.cat([]),
    "parts of other widths": lambda: SparseRows.cat([ROWS, MIXED.to(torch.float64)]),
    "parts of other dtypes": lambda: SparseRows.cat([ROWS, ROWS.to(torch.float32)]),
    "a row in no order": MIXED.to_sparse_csr,
    "an index twice": lambda: SparseRows(
        torch.tensor([0, 2]).int(), torch.tensor([1, 1]).int(), torch.ones(2), 2
    ).to_sparse_csr(),
    "what is no rows": lambda: SparseRows.cat([ROWS, DENSE]),
    "too many entries together": lambda: SparseRows.cat(
        [SparseRows(torch.tensor([0, 2**30]).int(), torch.zeros(1).int().expand(2**30), HUGE, 1)] * 2
    ),
    "too many entries of CSR": lambda: SparseRows.from_sparse_csr(
        torch.sparse_csr_tensor(
            [0, 2**31],
            torch.zeros(1).long().expand(2**31),
            torch.zeros(1).expand(2**31),
            (1, 4),
            check_invariants=False,
        )
    ),
    "more columns than int32 counts": lambda: SparseRows(ROWS.crow_indices, ROWS.indices, ROWS.values, 2**31),
    "columns that are no number": lambda: SparseRows(ROWS.crow_indices, ROWS.indices, ROWS.values, 4.0),
    "parts on two devices": lambda: SparseRows(ROWS.crow_indices.to("meta"), ROWS.indices, ROWS.values, 4),
    "an index of CSR that int32 cannot hold": lambda: SparseRows.from_sparse_csr(
        torch.sparse_csr_tensor([0, 1], [2**32 + 1], [1.0], (1, 2**31 - 1), check_invariants=False)
    ).to_dense(),
    "a pointer of CSR that int32 cannot hold": lambda: SparseRows.from_sparse_csr(
        torch.sparse_csr_tensor([0, -(2**32), 1], [0], [1.0], (2, 3), check_invariants=False)
    ).to_dense(),
    "a dense matrix": lambda: SparseRows.from_sparse_csr(DENSE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(KernelError, match=r"expected .*[,;] got"):
        REFUSED[case]()


@pytest.mark.parametrize("pointer", POINTERS, ids=str)
@pytest.mark.parametrize("use", LEADING)
def test_row_pointers_that_lead_elsewhere_are_refused(use: str, pointer: list[int]) -> None:
    rows = SparseRows(torch.tensor(pointer).int(), torch.tensor([0, 2, 1]).int(), torch.ones(3), 3)
    with pytest.raises(KernelError, match="to rise from 0 to the number of entries, 3"):
        LEADING[use](rows)


@pytest.mark.parametrize(
    ("pointer", "part"),
    [([0, 100, 3], slice(0, 1)), ([0, 100, 3], slice(1, 2)), ([0, -5, 2, 3], slice(1, 2)), ([0, 2, 1, 3], slice(1, 2))],
)
def test_a_slice_of_rows_that_lead_elsewhere_is_refused(pointer: list[int], part: slice) -> None:
    rows = SparseRows(torch.tensor(pointer).int(), torch.tensor([0, 2, 1]).int(), torch.ones(3), 3)
    with pytest.raises(KernelError, match="to rise from 0"):
        rows[part]


def test_what_a_user_notes_on_rows_is_copied_along() -> None:
    rows = ROWS[:2]
    vars(rows)["note"] = "of layer 3"
    for copied in (copy(rows), deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert copied.note == "of layer 3" and torch.equal(copied.to_dense(), rows.to_dense())


class _Named(SparseRows):
    def __init__(self, dense: torch.Tensor, name: str) -> None:
        rows = SparseRows.from_dense(dense)
        super().__init__(rows.crow_indices, rows.indices, rows.values, rows.columns)
        self.name = name


def test_rows_of_a_class_of_ones_own_are_copied() -> None:
    copied = deepcopy(_Named(DENSE, "latents"))
    assert type(copied) is _Named and copied.name == "latents" and torch.equal(copied.to_dense(), DENSE)


def test_whole_numbers_of_numpy_count_columns() -> None:
    assert SparseRows(ROWS.crow_indices, ROWS.indices, ROWS.values, np.int64(4)).columns == 4
    assert SparseRows.from_topk(torch.ones(2, 1), torch.zeros(2, 1).long(), np.int64(9)).shape == (2, 9)


HOSTILE: dict[str, dict[str, object]] = {
    "fewer values": {"values": torch.ones(1)},
    "values of a table": {"values": torch.ones(3, 2)},
    "indices of floats": {"indices": torch.ones(9)},
    "columns of floats": {"columns": 4.0},
    "columns below 0": {"columns": -1},
    "another check": {"_check": OrderedDict},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_was_tampered_with_is_refused_when_it_is_loaded(case: str) -> None:
    rows, file = SparseRows(ROWS.crow_indices, ROWS.indices, ROWS.values, 4), io.BytesIO()
    rows.__dict__ |= HOSTILE[case]
    torch.save(rows, file)
    file.seek(0)
    with pytest.raises((KernelError, pickle.UnpicklingError), match="expected"):
        torch.load(file, weights_only=True)


def test_a_sparse_layer_names_the_one_that_takes_rows() -> None:
    layer = SparseLinear(4, 3, sparsity=0.5, dtype=torch.float64)
    for other in (layer, TopK(1), SparseConv1d(4, 3, 1)):
        with pytest.raises(AttributeError, match="SparseInputLinear and SparseSparseLinear multiply"):
            other(ROWS)
    y = SparseSparseLinear.from_sparse_linear(layer)(ROWS)
    assert_same(y, layer(DENSE))
