"""Patterns: canonical or refused; every way in and out agrees; edits keep what survives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from children import numbers_of
from offpath import Pattern, SparseLinear, pattern as patterns
from offpath.nn import SparseConv1d
from offpath.pattern import PatternError


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits, dtype=torch.bool).view(rows, columns)


def int32(*entries: int) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32)


@given(masks())
def test_mask_round_trip(mask: Tensor) -> None:
    pattern = patterns.from_mask(mask)
    pattern.check()
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == int(mask.sum())
    assert torch.equal(pattern.row_counts, mask.sum(1).int())


@given(masks())
def test_csr_round_trip_against_torch(mask: Tensor) -> None:
    csr = mask.float().to_sparse_csr()
    pattern = patterns.from_csr(csr.crow_indices(), csr.col_indices(), tuple(mask.shape))
    assert pattern.equals(patterns.from_mask(mask))
    assert torch.equal(pattern.to_dense(csr.values()), mask.float())


@given(masks())
def test_transpose_is_the_transposed_mask_and_permutes_the_values(mask: Tensor) -> None:
    pattern = patterns.from_mask(mask)
    crow_indices, col_indices, permutation = pattern.transpose()
    transposed = Pattern((mask.shape[1], mask.shape[0]), crow_indices, col_indices)
    assert torch.equal(transposed.to_mask(), mask.t())
    values = torch.arange(pattern.nnz)
    assert torch.equal(transposed.to_dense(values[permutation.long()]), pattern.to_dense(values).t())
    again = transposed.transpose()
    assert torch.equal(again.col_indices, pattern.col_indices)
    assert torch.equal(permutation[again.permutation.long()].long(), values)


@given(masks(), st.data())
def test_edit_carries_survivors_and_fills_the_grown(mask: Tensor, data: st.DataObject) -> None:
    pattern = patterns.from_mask(mask)
    slots = data.draw(st.lists(st.sampled_from(range(pattern.nnz)), unique=True) if pattern.nnz else st.just([]))
    dropped = mask.clone()
    for slot in slots:
        dropped[int(pattern.row_indices()[slot]), int(pattern.col_indices[slot])] = False
    free = [tuple(position) for position in (~dropped).nonzero().tolist()]
    grown = data.draw(st.lists(st.sampled_from(free), unique=True) if free else st.just([]))
    rows, columns = (torch.tensor([p[i] for p in grown], dtype=torch.int64) for i in (0, 1))

    change = patterns.edit(pattern, torch.tensor(slots, dtype=torch.int64), (rows, columns))

    expected = dropped.clone()
    expected[rows, columns] = True
    assert torch.equal(change.pattern.to_mask(), expected)
    values = torch.arange(1.0, pattern.nnz + 1)
    before, after = pattern.to_dense(values), change.pattern.to_dense(change.carry(values))
    assert torch.equal(after, before * dropped)  # survivors keep their bits, grown ones are zero
    grown_values = change.pattern.to_dense(change.carry(values, fill=-7.0)) * (expected & ~dropped)
    assert int((grown_values == -7).sum()) == len(grown)
    survivors = change.old_to_new >= 0
    assert torch.equal(change.new_to_old[change.old_to_new[survivors].long()], survivors.nonzero().squeeze(1).int())
    assert int((change.old_to_new < 0).sum()) == len(slots)
    assert int((change.new_to_old < 0).sum()) == len(grown)


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        (int32(0, 2, 3), int32(2, 0, 1), "unsorted columns in row 0 .2 then 0."),
        (int32(0, 1, 3), int32(0, 1, 1), "a duplicate column in row 1"),
        (int32(0, 2, 3), int32(0, 3, 1), r"expected columns in \[0, 3\), got 3"),
        (int32(0, 2, 3), int32(-1, 0, 1), r"expected columns in \[0, 3\), got -1"),
        (int32(0, 2), int32(0, 1), "expected crow_indices of 3 entries for 2 rows, got 2"),
        (int32(0, 2, 2), int32(0, 1, 2), "got 0 to 2"),
        (int32(1, 2, 3), int32(0, 1, 2), "got 1 to 3"),
        (int32(0, 4, 3), int32(0, 1, 2), "never fall, but it does at row 1"),
        (torch.tensor([0, 2, 3]), int32(0, 1, 2), "int64.*from_csr"),
        (int32(0, 2, 3), int32(0, 1, 2).float(), "float32.*from_csr"),
        (int32(0, 2, 3), int32(0, 9, 1, 9, 2, 9)[::2], "contiguous"),
        (int32(0, 2, 3), int32(0, 1, 2).to("meta"), "one device"),
    ],
)
def test_arrays_that_are_not_canonical_are_refused(crow: Tensor, col: Tensor, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern((2, 3), crow, col)


@pytest.mark.parametrize("seed", range(20))
def test_check_rejects_every_corruption_of_one_entry(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern = patterns.random((5, 6), 15, generator)
    slot = int(torch.randint(15, (1,), generator=generator))
    row_start = int(pattern.crow_indices[int(pattern.row_indices()[slot])])
    for wrong in (-1, 6, int(pattern.col_indices[slot - 1]) if slot > row_start else 6):
        col_indices = pattern.col_indices.clone()
        col_indices[slot] = wrong
        with pytest.raises(PatternError):
            Pattern((5, 6), pattern.crow_indices.clone(), col_indices)


def test_shapes_and_counts_at_the_int32_boundary_are_refused() -> None:
    with pytest.raises(PatternError, match=r"2\^31"):
        Pattern((2, 2**31), int32(0, 0, 0), int32())
    with pytest.raises(PatternError, match=r"2\^31"):
        patterns.random((65536, 65536), nnz=2**31)
    with pytest.raises(PatternError, match=r"2\^31"):
        patterns.full((65536, 65536))
    with pytest.raises(PatternError, match=r"2\^31"):
        patterns.from_csr(torch.tensor([0, 2**31]), torch.tensor([0]), (1, 4))
    widest = Pattern((1, 2**31 - 1), int32(0, 1), int32(2**31 - 2))
    assert widest.nnz == 1


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 2), torch.ones(2, 2, 2, dtype=torch.bool)])
def test_from_mask_refuses_other_tensors(mask: Tensor) -> None:
    with pytest.raises(PatternError, match="expected a 2-D bool mask"):
        patterns.from_mask(mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: patterns.from_mask(np.eye(3) > 0), "expected mask to be a tensor, got a ndarray; torch.from_numpy"),
        (lambda: patterns.from_dense(np.eye(3)), "expected weight to be a tensor, got a ndarray"),
        (
            lambda: patterns.from_dense(torch.eye(3).to_sparse_csr()),
            "dense, got layout torch.sparse_csr; from_csr takes",
        ),
        (lambda: patterns.from_csr(np.arange(3), np.arange(2), (2, 2)), "expected crow_indices to be a tensor, got a"),
        (lambda: patterns.from_positions(np.arange(2), (2, 2)), "expected positions to be a tensor, got a ndarray"),
        (lambda: patterns.from_positions(torch.ones(1), (2, 2)), r"positions \[nnz\] in int64, got torch.float32"),
        (lambda: patterns.from_positions(torch.tensor([1, 100]), (2, 3)), r"positions in \[0, 6\), got 100"),
        (lambda: patterns.from_positions(torch.tensor([-1, 1]), (2, 3)), r"positions in \[0, 6\), got -1"),
        (lambda: patterns.random((8, 8), 0.5), "expected nnz to be a whole number, got 0.5"),
        (lambda: SparseLinear(3, 2, pattern=torch.ones(2, 3) > 0), "an offpath.Pattern, got a Tensor; .*from_mask"),
        (lambda: SparseLinear.from_dense(nn.Linear(3, 2), torch.ones(2, 3) > 0), "an offpath.Pattern, got a Tensor"),
        (lambda: SparseConv1d.from_dense(nn.Conv1d(3, 2, 1), torch.ones(2, 3) > 0), "an offpath.Pattern, got a Tenso"),
    ],
)
def test_what_is_no_pattern_is_told_how_to_become_one(build: Callable[[], object], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        build()


def test_from_dense_keeps_nan() -> None:
    assert patterns.from_dense(torch.tensor([[0.0, float("nan")]])).nnz == 1


@given(st.integers(0, 12), st.integers(0, 12), st.data())
def test_random_has_exactly_nnz_connections(rows: int, columns: int, data: st.DataObject) -> None:
    nnz = data.draw(st.integers(0, rows * columns))
    pattern = patterns.random((rows, columns), nnz, torch.Generator().manual_seed(0))
    pattern.check()
    assert pattern.nnz == nnz


def test_random_is_uniform_over_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    for nnz in (3, 9):  # below and above half of the twelve positions: two code paths
        counts = sum(patterns.random((3, 4), nnz, generator).to_mask().double() for _ in range(draws))
        p = nnz / 12
        # Binomial counts: 12 positions x 2 cases, so 5 standard deviations fail by chance once in 70,000 runs.
        assert float((counts - draws * p).abs().max()) < 5 * (draws * p * (1 - p)) ** 0.5


def test_random_repeats_with_its_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (patterns.random((50, 60), 300, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.equals(second)
    assert torch.equal(state, torch.get_rng_state())


def test_large_random_pattern_takes_memory_in_proportion_to_its_connections() -> None:
    nnz, peak_bytes = numbers_of(
        "import torch, offpath\n"
        "before = peak_bytes()\n"
        "pattern = offpath.pattern.random((65536, 65536), nnz=4294967)\n"
        "pattern.transpose()\n"
        "print(pattern.nnz, peak_bytes() - before)"
    )
    assert nnz == 4294967
    # A byte per position would be 4 GiB. The draw holds a few int64 arrays of nnz entries (34 MB each) at a time.
    assert peak_bytes < 15 * nnz * 8


@pytest.mark.parametrize(
    ("drop", "grow", "message"),
    [
        (torch.tensor([3]), None, r"expected slots in \[0, 3\)"),
        (torch.tensor([-1]), None, r"expected slots in \[0, 3\)"),
        (torch.tensor([1, 1]), None, "duplicates"),
        (torch.tensor([1.0]), None, "integer"),
        (None, (torch.tensor([0]), torch.tensor([0])), r"\(0, 0\) is already a connection"),
        (None, (torch.tensor([0, 0]), torch.tensor([1, 1])), "duplicates"),
        (None, (torch.tensor([2]), torch.tensor([0])), r"rows in \[0, 2\)"),
        (None, (torch.tensor([0]), torch.tensor([3])), r"columns in \[0, 3\)"),
        (None, (torch.tensor([0, 1]), torch.tensor([1])), "as many rows as columns"),
        (None, (torch.tensor([0.5]), torch.tensor([1])), "expected integer rows to grow"),
    ],
)
def test_edits_that_do_not_fit_are_refused(drop, grow, message: str) -> None:
    pattern = Pattern((2, 3), int32(0, 2, 3), int32(0, 2, 1))
    with pytest.raises(PatternError, match=message):
        patterns.edit(pattern, drop, grow)


def test_carry_refuses_a_tensor_of_another_size() -> None:
    change = patterns.edit(patterns.full((2, 2)), drop=torch.tensor([0]))
    with pytest.raises(PatternError, match="one entry for each of the 4 old slots"):
        change.carry(torch.zeros(3))


def test_a_pattern_is_frozen_and_survives_copy_and_pickle() -> None:
    pattern = patterns.random((5, 6), 7)
    with pytest.raises(AttributeError):
        pattern.shape = (1, 1)  # type: ignore[misc]  # the assignment that must fail
    for twin in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert twin.equals(pattern)


def test_from_csr_copies_so_that_the_pattern_stays_what_it_was() -> None:
    crow, col = int32(0, 2, 3), int32(0, 2, 1)
    pattern = patterns.from_csr(crow, col, (2, 3))
    col.fill_(7)
    assert pattern.col_indices.tolist() == [0, 2, 1]


def test_meta_pattern_has_its_sizes() -> None:
    pattern = patterns.random((5, 6), 7, device="meta")
    assert pattern.nnz == 7 and pattern.device.type == "meta"
