"""Products with many tokens over buckets: the plan, and the kernels, run on the CPU, right and with mistakes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from checkers import gamma, unit_roundoff
from gpu.cases_buckets import SHAPES
from gpu.draws import pattern
from gpu_on_cpu import COMPILER, Launcher, Programs, bucketed_dots, bucketed_sum, bucketed_variant, dots_variant
from offpath.kernels import KernelError
from offpath.kernels.gpu import bucketed, launch
from offpath.kernels.gpu.buckets import DTYPES, ROWS, TOKENS, Buckets, make_buckets
from offpath.kernels.gpu.regions import CAPACITY, Regions, make_regions
from test_gpu_formats import csr, random_mask

# Two blocks of rows, the second one cut off; two of tokens, the second one cut off; several chunks of columns.
N_ROWS, N_COLUMNS, WIDTH = ROWS + 9, 70, TOKENS + 32
SHARED_BYTES = 64 * 1024
SUMS = {dtype: bucketed_variant(dtype) for dtype in DTYPES}
SUM_MUTANTS = {
    "the second of a pair is left out": ("add(sums[row], lane_x + pair.z, pair.w);", ""),
    "rows take over from the row before": ("begin = end;", ""),
    "copies are not waited for": ("wait_for_copies();\n        __syncthreads();", "__syncthreads();"),
    "others' copies are not waited for": ("wait_for_copies();\n        __syncthreads();", "wait_for_copies();"),
    "one buffer for both": ("staged + chunk % 2 * x_bytes + lane", "staged + lane"),
    "the pairs of the chunk before": ("staged_pairs + chunk % 2 * most_pairs;", "staged_pairs;"),
    "the column of zeros is not cleared": ("chunk_columns * ROW_BYTES + i % PIECES * 16) = uint4{0, 0, 0, 0};",
                                           "chunk_columns * ROW_BYTES + i % PIECES * 16);"),
    "columns behind the last are read": ("min(chunk_columns, n_columns - first)", "chunk_columns"),
    "tokens behind the last are read": ("const bool there = own_token < width;", "const bool there = true;"),
    "tokens behind the last are written": ("if (token >= width)", "if (false)"),
    "places without a row are written": ("if (row < 0)", "if (false)"),
    "the bias is forgotten": ("bias ? widen(bias[row]) : 0.0f", "0.0f"),
    "rounded towards zero": ("bits + 0x7fffu + (bits >> 16 & 1u)", "bits"),
}  # fmt: skip

DOTS = {dtype: dots_variant(dtype) for dtype in DTYPES}
DOT_MUTANTS = {
    "the other column is left out": ("columns[j] >> 16", "columns[j] & 0xffffu"),
    "the last ones of a warp are left out": ("if (2 * i < mine)", "if (2 * i + 2 < mine)"),
    "sums of no connection are written": ("lane == 0 && slot >= 0", "lane == 0"),
    "copies are not waited for": ("wait_for_copies();\n        __syncthreads();", "__syncthreads();"),
    "others' copies are not waited for": ("wait_for_copies();\n        __syncthreads();", "wait_for_copies();"),
    "one buffer for both": ("first_token / TOKENS % 2 * buffer_bytes + lane * 8", "lane * 8"),
    "rows behind the last are read": ("min(side, n_rows - first_row)", "side"),
    "columns behind the last are read": ("min(side, n_columns - first_column)", "side"),
    "tokens behind the last are read": ("const bool there = token < width;", "const bool there = true;"),
    "half of the lanes are summed": ("int distance = 16", "int distance = 8"),
    "a block takes the first region's": ("corners[2 * blockIdx.x]", "corners[0]"),
    "rounded towards zero": ("bits + 0x7fffu + (bits >> 16 & 1u)", "bits"),
}


def planned(mask: Tensor, dtype: torch.dtype, shared_bytes: int = SHARED_BYTES) -> Buckets:
    crow_indices, col_indices, _ = csr(mask, dtype)
    return make_buckets(crow_indices, col_indices, mask.shape[1], dtype, None, shared_bytes)


def written_out(buckets: Buckets, values: Tensor) -> Tensor:
    """The matrix, read from the plan as a kernel reads it."""
    rows, columns = buckets.shape
    dense = torch.zeros(rows, columns)
    entries, row_bytes = buckets.with_values(values), TOKENS * buckets.dtype.itemsize
    chunks = -(-columns // buckets.chunk_columns)
    begins = buckets.pair_offsets.tolist()
    for place, row in enumerate(buckets.row_order.tolist()):
        for chunk in range(chunks):
            run = (place // ROWS * chunks + chunk) * ROWS + place % ROWS
            for offset, bits in entries[2 * begins[run] : 2 * begins[run + 1]]:
                column = int(offset) // row_bytes
                assert column * row_bytes == int(offset) and column <= buckets.chunk_columns
                if column < buckets.chunk_columns:
                    assert row >= 0 and dense[row, chunk * buckets.chunk_columns + column] == 0
                    dense[row, chunk * buckets.chunk_columns + column] = bits.view(torch.float32)
                else:
                    assert bits == 0
    return dense.to(values.dtype)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 256, 300]),
    columns=st.sampled_from([0, 1, 16, 70]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_plan_has_every_connection_once(rows: int, columns: int, density: float, dtype: torch.dtype) -> None:
    mask = random_mask(rows, columns, density)
    values = csr(mask, dtype)[2].abs() + 1
    dense = torch.zeros(rows, columns, dtype=dtype)
    dense[mask] = values
    buckets = planned(mask, dtype)
    assert buckets.shared_bytes <= SHARED_BYTES
    assert torch.equal(written_out(buckets, values), dense)


def test_the_plan_of_a_transpose_has_the_values_of_the_original() -> None:
    mask = random_mask(300, 70, 0.1)
    values = csr(mask, torch.float32)[2]
    dense = torch.zeros(300, 70)
    dense[mask] = values
    crow_indices, col_indices, _ = csr(mask.t(), torch.float32)
    number = torch.zeros(300, 70, dtype=torch.int64)
    number[mask] = torch.arange(values.numel())
    buckets = make_buckets(crow_indices, col_indices, 300, torch.float32, number.t()[mask.t()].int(), SHARED_BYTES)
    assert torch.equal(written_out(buckets, values), dense.t())


def test_rows_of_similar_length_share_a_block_and_chunks_fill_shared_memory() -> None:
    mask = random_mask(512, 400, 0.02)
    mask[::2] |= random_mask(256, 400, 0.5)
    buckets = planned(mask, torch.float32, 200_000)
    lengths = mask.sum(1)[buckets.row_order.long()].view(2, 16, 16)
    assert int(lengths[0].min()) >= int(lengths[1].max())
    assert float((lengths.sum(2).max(1).values / lengths.sum(2).min(1).values).max()) < 1.2, "warps have unequal work"
    assert 200_000 * 0.7 < buckets.shared_bytes <= 200_000
    with pytest.raises(KernelError, match=r"float32 or bfloat16, got torch\.float64"):
        planned(mask, torch.float64)
    with pytest.raises(KernelError, match="more than 1,000 bytes of shared memory"):
        planned(mask, torch.float32, 1000)


def in_regions(mask: Tensor, shared_bytes: int = SHARED_BYTES) -> Regions:
    crow_indices, col_indices, _ = csr(mask, torch.float32)
    return make_regions(crow_indices, col_indices, mask.shape[1], shared_bytes)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 100]),
    columns=st.sampled_from([0, 1, 16, 130]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_regions_have_every_connection_once(rows: int, columns: int, density: float) -> None:
    mask = random_mask(rows, columns, density)
    if mask.numel():
        mask[:, 0] = True  # more than a block takes, in some regions
    regions, (row, column) = in_regions(mask), mask.nonzero().unbind(1)
    assert regions.shared_bytes <= SHARED_BYTES and regions.nnz == row.numel()
    counts = regions.begins.diff()
    assert int(counts.sum()) == regions.twos.shape[0] and int(counts.max() if counts.numel() else 0) <= CAPACITY
    corner = regions.corners.repeat_interleave(counts, dim=0).repeat_interleave(2, dim=0)
    in_region = torch.stack([regions.twos[:, 0] & 0xFFFF, regions.twos[:, 0] >> 16 & 0xFFFF], 1).flatten()
    place_of_row = regions.twos[:, 1].repeat_interleave(2)
    slots, real = regions.slots.long(), regions.slots >= 0
    assert torch.equal(slots[real].sort().values, torch.arange(regions.nnz))
    assert torch.equal((corner[:, 1] + in_region // 256)[real], column[slots[real]].int())
    assert torch.equal((corner[:, 0] + place_of_row // 256 - regions.side)[real], row[slots[real]].int())
    assert bool((in_region % 256 == 0).all()) and bool((in_region < regions.side * 256).all())
    with pytest.raises(KernelError, match="more than 4,000 bytes of shared memory"):
        in_regions(mask, 4000)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the CUDA sources on the CPU with")
    variants = [*SUMS.values(), *(bucketed_variant(torch.bfloat16, edit) for edit in SUM_MUTANTS.values())]
    variants += [*DOTS.values(), *(dots_variant(torch.bfloat16, edit) for edit in DOT_MUTANTS.values())]
    return Programs(tmp_path_factory.mktemp("gpu_on_cpu") / "buckets", variants)


class Problem:
    """A sparse weight, activations by feature and a bias; small whole numbers, or normally distributed ones."""

    def __init__(self, dtype: torch.dtype, whole: bool) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            return (numbers * 1.5).round().to(dtype) if whole else numbers.to(dtype)

        self.mask = random_mask(N_ROWS, N_COLUMNS, 0.1)
        self.mask[3], self.mask[4], self.mask[:, 7] = True, False, False
        self.weight = draw(N_ROWS, N_COLUMNS) * self.mask
        self.values = self.weight[self.mask]
        self.x, self.bias = draw(N_COLUMNS, WIDTH), draw(N_ROWS)
        self.buckets = planned(self.mask, dtype, 12 * 1024 * dtype.itemsize)
        assert self.buckets.chunk_columns * 2 < N_COLUMNS, "buffers have to be used again"

    @property
    def exact(self) -> Tensor:
        return self.weight.double() @ self.x.double() + self.bias.double()[:, None]

    def check(self, y: Tensor) -> None:
        """|y - y64| <= gamma_k (|W||x| + |b|) for sums in float32, and one rounding more (see checkers.py)."""
        size = self.weight.double().abs() @ self.x.double().abs() + self.bias.double().abs()[:, None]
        terms = (self.mask.sum(1) + 1)[:, None]
        bound = (gamma(terms, torch.float32) + gamma(terms, torch.float64)) * size
        if y.dtype is torch.bfloat16:
            bound += unit_roundoff(y.dtype) * (self.exact.abs() + bound)
        assert y.isfinite().all() and bool(((y.double() - self.exact).abs() <= bound).all())


def every_sum(dtype: torch.dtype, run) -> None:
    whole, normal = Problem(dtype, True), Problem(dtype, False)
    exact = whole.exact.to(dtype)
    whole.x[7] = torch.nan  # no row has a connection there
    assert torch.equal(run(whole), exact), "small whole numbers have one result"
    forwards = run(normal)
    normal.check(forwards)
    assert torch.equal(forwards, run(normal, backwards=True)), "the order of the threads is to be seen in the result"


def summed(programs: Programs, variant, problem: Problem, **options) -> Tensor:
    return bucketed_sum(programs, variant, problem.buckets, problem.values, problem.x, problem.bias, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bucketed_sum(programs: Programs, dtype: torch.dtype) -> None:
    every_sum(dtype, partial(summed, programs, SUMS[dtype]))
    problem = Problem(dtype, True)
    problem.bias.zero_()
    y = bucketed_sum(programs, SUMS[dtype], problem.buckets, problem.values, problem.x, None)
    assert torch.equal(y, problem.exact.to(dtype))


@pytest.mark.parametrize("name", SUM_MUTANTS)
def test_mistakes_in_sums_are_noticed(programs: Programs, name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        every_sum(torch.bfloat16, partial(summed, programs, bucketed_variant(torch.bfloat16, SUM_MUTANTS[name])))


class Gradient:
    """The operands of a gradient of the values; small whole numbers, or normally distributed ones."""

    def __init__(self, dtype: torch.dtype, whole: bool) -> None:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            return (numbers * 1.5).round().to(dtype) if whole else numbers.to(dtype)

        # The first region has more connections than a block takes, another one none.
        mask = random_mask(70, 60, 0.3)
        mask[:32, :32], mask[32:64, :32], mask[:, 35] = True, False, False
        self.rows, self.columns = mask.nonzero().unbind(1)
        # An odd number of parts of the tokens, of which the last one is cut off.
        width = 2 * 256 // dtype.itemsize + 16
        self.dy, self.x = draw(70, width), draw(60, width)
        self.regions = in_regions(mask, 4 * 40 * 256 + 8 * CAPACITY)
        assert self.regions.corners.shape[0] > len(self.regions.corners.unique(dim=0))

    @property
    def exact(self) -> Tensor:
        return (self.dy.double()[self.rows] * self.x.double()[self.columns]).sum(1)

    def check(self, dvalues: Tensor) -> None:
        """As that of `Problem`, for sums over the tokens."""
        size = (self.dy.double()[self.rows] * self.x.double()[self.columns]).abs().sum(1)
        terms = torch.tensor(self.x.shape[1])
        bound = (gamma(terms, torch.float32) + gamma(terms, torch.float64)) * size
        if dvalues.dtype is torch.bfloat16:
            bound += unit_roundoff(dvalues.dtype) * (self.exact.abs() + bound)
        assert dvalues.isfinite().all() and bool(((dvalues.double() - self.exact).abs() <= bound).all())


def every_dot(dtype: torch.dtype, run) -> None:
    whole, normal = Gradient(dtype, True), Gradient(dtype, False)
    exact = whole.exact.to(dtype)
    whole.x[35] = torch.nan  # no row has a connection there
    assert torch.equal(run(whole), exact), "small whole numbers have one result"
    forwards = run(normal)
    normal.check(forwards)
    assert torch.equal(forwards, run(normal, backwards=True)), "the order of the threads is to be seen in the result"


def test_a_case_of_the_run_asks_for_all_shared_memory() -> None:
    """A limit that is a little wrong shows there alone: no block with fewer bytes meets it."""
    limit = 226 * 1024  # of an H100, beside what its driver reserves
    found = [make_regions(*pattern(*shape, "cpu"), shape[1], limit) for shape in SHAPES["full"]]
    assert max(regions.shared_bytes for regions in found if regions.nnz) == limit


def dotted(programs: Programs, variant, problem: Gradient, **options) -> Tensor:
    return bucketed_dots(programs, variant, problem.regions, problem.dy, problem.x, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bucketed_dots(programs: Programs, dtype: torch.dtype) -> None:
    every_dot(dtype, partial(dotted, programs, DOTS[dtype]))


@pytest.mark.parametrize("name", DOT_MUTANTS)
def test_mistakes_in_dots_are_noticed(programs: Programs, name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        every_dot(torch.bfloat16, partial(dotted, programs, dots_variant(torch.bfloat16, DOT_MUTANTS[name])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches(programs: Programs, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """From the products down to the kernels; what turns activations is Triton's, and left out by their layout."""
    launcher = Launcher(programs, monkeypatch)
    monkeypatch.setattr(bucketed, "load", launcher.load)
    monkeypatch.setattr(bucketed, "shared_bytes_limit", lambda device: SHARED_BYTES)
    monkeypatch.setattr(bucketed, "tokens_of", lambda y, batch: y[:, :batch].t().contiguous())
    problem, gradient = Problem(dtype, True), Gradient(dtype, True)
    crow_indices, col_indices, _ = csr(problem.mask, dtype)
    plan = bucketed.plan(crow_indices, col_indices, N_COLUMNS, dtype)
    y = bucketed.planned_spmm(plan, problem.values, problem.x.t(), problem.bias)
    assert torch.equal(y, problem.exact.t().to(dtype)) and y.is_contiguous()
    y = bucketed.planned_spmm(plan, problem.values, problem.x.t(), None, feature_major=True)
    assert torch.equal(y, (problem.exact - problem.bias.double()[:, None]).t().to(dtype)) and y.t().is_contiguous()
    assert launcher.launches == [("bucketed_sum", (2, 2), 512)] * 2

    mask = torch.zeros(70, 60, dtype=torch.bool)
    mask[gradient.rows, gradient.columns] = True
    crow_indices, col_indices, values = csr(mask, dtype)
    regions = bucketed.tiles(crow_indices, col_indices, 60)
    dy, x = gradient.dy.t(), gradient.x.t()
    assert torch.equal(bucketed.tiled_sddmm(regions, dy, x), gradient.exact.to(dtype))
    transposed, number = csr(mask.t(), dtype), torch.zeros(70, 60, dtype=torch.int32)
    number[mask] = torch.arange(values.numel(), dtype=torch.int32)
    back = bucketed.plan(*transposed[:2], 70, dtype, number.t()[mask.t()])
    values = values.round()
    dense = torch.zeros(70, 60, dtype=dtype)
    dense[mask] = values
    dx, dvalues, dbias = bucketed.backward(back, regions, None, values, dy, x, feature_major=True)
    assert torch.equal(dx, (dy.double() @ dense.double()).to(dtype)) and dx.t().is_contiguous()
    assert torch.equal(dvalues, gradient.exact.to(dtype)) and torch.equal(dbias, dy.sum(0))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    problem, gradient = Problem(torch.float32, True), Gradient(torch.float32, True)
    with pytest.raises(KernelError, match=r"plan was made, got torch\.bfloat16; make another"):
        bucketed.planned_spmm(problem.buckets, problem.values.bfloat16(), problem.x.t().bfloat16())
    with pytest.raises(KernelError, match="operands whose shapes fit"):
        bucketed.planned_spmm(problem.buckets, problem.values[1:], problem.x.t())
    with pytest.raises(KernelError, match="operands whose shapes fit"):
        bucketed.tiled_sddmm(gradient.regions, gradient.dy.t()[1:], gradient.x.t())
    with pytest.raises(KernelError, match=r"float32 or bfloat16, got torch\.float64"):
        bucketed.tiled_sddmm(gradient.regions, gradient.dy.t().double(), gradient.x.t().double())
    with pytest.raises(KernelError, match="one that fills in zeros"):
        bucketed.backward(problem.buckets, None, object(), problem.values, problem.x.t(), problem.x.t())
    for made in (bucketed.plan, bucketed.tiles):
        with pytest.raises(KernelError, match="expected tensors on an NVIDIA GPU, got cpu"):
            made(*csr(problem.mask, torch.float32)[:2], N_COLUMNS, *([torch.float32] if made is bucketed.plan else []))
