"""The packed formats of the GPU's decoding kernel: every connection once, in turn of the banks, bits as described."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from offpath.kernels import KernelError
from offpath.kernels.gpu import formats
from offpath.kernels.gpu.formats import BANKS, LANES, STRIDE, Kind, Packed, pack, replace_values, unpack
from offpath.kernels.gpu.n4 import GROUP, MAX_GAP

KINDS: tuple[Kind, ...] = ("n4", "c16")


def csr(mask: Tensor, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(seed)).to(dtype)
    crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    return crow_indices, mask.nonzero()[:, 1].int(), values


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def check_round_trip(mask: Tensor, kind: Kind | None, dtype: torch.dtype) -> Packed:
    matrix = csr(mask, dtype)
    packed = pack(*matrix, mask.shape[1], kind)
    assert all(torch.equal(was, came) for was, came in zip(matrix, unpack(packed), strict=True))
    assert packed.values.numel() == int(packed.group_offsets[-1]) * GROUP
    return packed


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 7),
    columns=st.one_of(st.integers(0, 80), st.integers(300, 1500)),
    density=st.sampled_from([0.0, 0.004, 0.05, 0.3, 0.9, 1.0]),
    kind=st.sampled_from([*KINDS, None]),
    dtype=st.sampled_from(formats.DTYPES),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(rows, columns, density, kind, dtype, seed) -> None:
    check_round_trip(random_mask(rows, columns, density, seed), kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 2**15 - 1, 2**15, 2**16 - 1])
def test_every_column_that_16_bits_can_name(kind: Kind, column: int) -> None:
    mask = torch.zeros(3, 2**16, dtype=torch.bool)
    mask[1, column] = mask[2, 0] = mask[2, column] = True
    check_round_trip(mask, kind, torch.float32)


@pytest.mark.parametrize("units", [MAX_GAP - 1, MAX_GAP, MAX_GAP + 1, 2 * MAX_GAP, 2 * MAX_GAP + 1, 9 * MAX_GAP])
def test_wide_gaps_are_bridged(units: int) -> None:
    mask = torch.zeros(1, 3000, dtype=torch.bool)
    mask[0, [5, 5 + units * STRIDE]] = True
    packed = check_round_trip(mask, "n4", torch.float32)
    n_slots = 2 + (units - 1) // MAX_GAP
    assert packed.values.numel() == -(-n_slots // GROUP) * GROUP


def test_zeros_are_kept_and_negative_zero_marks_no_connection() -> None:
    mask = random_mask(5, 90, 0.4)
    crow_indices, col_indices, values = csr(mask, torch.bfloat16)
    values[::3], values[1::3] = 0.0, -0.0
    for kind in KINDS:
        packed = pack(crow_indices, col_indices, values, 90, kind)
        came = unpack(packed)
        assert torch.equal(came[0], crow_indices) and torch.equal(came[1], col_indices)
        assert torch.equal(came[2], values)
        assert int((packed.values.view(torch.int16) == -(2**15)).sum()) == packed.values.numel() - values.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_of_the_same_connections(kind: Kind) -> None:
    mask = random_mask(9, 200, 0.2)
    crow_indices, col_indices, values = csr(mask, torch.float32)
    packed = pack(crow_indices, col_indices, values, 200, kind)
    replace_values(packed, values * 2)
    assert torch.equal(unpack(packed)[2], values * 2)
    for wrong in (values[1:], values.double()):
        with pytest.raises(KernelError, match="Pack the weight anew"):
            replace_values(packed, wrong)
    assert torch.equal(unpack(packed)[2], values * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_lanes_fetch_from_different_banks(kind: Kind, density: float) -> None:
    """How often a warp's fetch has to be repeated, on average: 3.5 times for columns in their order."""
    packed = pack(*csr(random_mask(4, 8192, density), torch.float32), 8192, kind)
    columns = (packed.columns.int() & 0xFFFF).long()
    if packed.gaps is not None:
        nibbles = (packed.gaps[:, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        steps = (nibbles + 1).long() * STRIDE
        steps[:, 0] = columns
        columns = steps.cumsum(1)
    columns = columns.view(-1, GROUP)
    repeats = []
    for begin, end in zip(packed.group_offsets[:-1].tolist(), packed.group_offsets[1:].tolist(), strict=True):
        for first in range(begin, end - LANES + 1, LANES):
            banks = columns[first : first + LANES] % BANKS
            repeats += [int(torch.bincount(banks[:, slot]).max()) for slot in range(GROUP)]
    assert sum(repeats) / len(repeats) < (2.1 if kind == "n4" else 1.5)


def test_the_format_is_chosen_by_its_bytes() -> None:
    for density in (0.02, 0.05, 0.1, 0.3, 0.5):
        for dtype in formats.DTYPES:
            matrix = csr(random_mask(4, 8192, density), dtype)
            n4, c16 = (pack(*matrix, 8192, kind).n_bytes for kind in KINDS)
            if abs(n4 / c16 - 0.85) > 0.02:  # the offsets count as bytes, and not in the choice
                assert pack(*matrix, 8192).kind == ("n4" if n4 < 0.85 * c16 else "c16")
    assert pack(*csr(random_mask(16, 8192, 0.5), torch.bfloat16), 8192).kind == "n4"
    assert pack(*csr(random_mask(16, 8192, 0.02), torch.bfloat16), 8192).kind == "c16"


def test_refusals() -> None:
    crow_indices, col_indices, values = csr(random_mask(2, 9, 0.5), torch.float32)
    with pytest.raises(KernelError, match=r"float32 or bfloat16, got torch\.float64"):
        pack(crow_indices, col_indices, values.double(), 9)
    with pytest.raises(KernelError, match="at most 65,536 columns"):
        pack(crow_indices, col_indices, values, 2**16 + 1)
    with pytest.raises(KernelError, match="as many values as column indices"):
        pack(crow_indices, col_indices, values[1:], 9)
