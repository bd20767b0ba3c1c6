"""A sparse weight in tiles: its format, and its product on tensor cores, run on the CPU, right and with mistakes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from checkers import gamma, unit_roundoff
from gpu_on_cpu import COMPILER, Launcher, Programs, Variant, multiply_tiles, reduce_variant, tile_variants
from offpath.kernels import KernelError
from offpath.kernels.gpu import tensor_cores
from offpath.kernels.gpu.n4 import GROUP
from offpath.kernels.gpu.tensor_cores import defines_of
from offpath.kernels.gpu.tiles import PLACES, STRIDE, Tiles, pack_tiles, unpack_tiles
from test_gpu_formats import csr, random_mask

BF16 = torch.bfloat16
# Two rows of tiles, of which the last ones are cut off; a tile that is full, one that is empty, and an empty row.
ROWS, COLUMNS = 70, 544
# Tokens of the kernel and warps of a block: one part of the columns, and more of them.
KERNELS = {(tokens, warps): tile_variants(tokens, warps) for tokens, warps in ((8, 2), (16, 8), (32, 4))}
SEEN_WHOLE, MISTAKES_IN = (8, 2), (8, 4)
MUTANTS = {
    "a gap is one unit short": ("place + (slot << GAP_SHIFT)", "place"),
    "the last threads are left out": ("if (first + THREADS * i + self < end)", "if (first + THREADS * (i + 1) < end)"),
    "groups are taken from the next tile": ("if (group < end)", "if (true)"),
    "a tile is not cleared when it is read": ("*place = uint4{0, 0, 0, 0};", ""),
    "shared memory is not cleared before": ("shared[i] = uint4{0, 0, 0, 0};", ""),
    "x is not waited for": ("wait_for_copies();\n        __syncthreads();", "__syncthreads();"),
    "tiles are not waited for": ("wait_for_copies();\n        __syncthreads();", "wait_for_copies();"),
    "the sums are not waited for": ("    __syncthreads();\n    for (int i", "    for (int i"),
    "what is behind the columns is read": ("const bool there = chunk < n_chunks;", "const bool there = true;"),
    "both halves take the upper rows": ("(half * 2 + fragment) * RUNS", "fragment * RUNS"),
    "a part of the warps is left out": ("other < PARTS", "other < 1"),
    "both steps take the same x": ("b[step]);", "b[0]);"),
    "rows behind the last are written": ("if (row < n_rows)", "if (true)"),
    "a tile is left out": ("(blockIdx.y + 1) / gridDim.y", "(blockIdx.y + 1) / gridDim.y - blockIdx.y"),
}  # fmt: skip
REDUCE_MUTANTS = {
    "a part is left out": ("part < parts", "part < 1"),
    "the bias is forgotten": ("(bias ? widen(bias[place % n_outputs]) : 0.0f)", "0.0f"),
    "rounded towards zero": ("bits + 0x7fffu + (bits >> 16 & 1u)", "bits"),
}


@settings(max_examples=30, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 7), st.integers(60, 140)),
    columns=st.one_of(st.integers(0, 80), st.integers(240, 600)),
    density=st.sampled_from([0.0, 0.002, 0.05, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(rows, columns, density, seed) -> None:
    matrix = csr(random_mask(rows, columns, density, seed), BF16)
    tiles = pack_tiles(*matrix, columns)
    assert all(torch.equal(was, came) for was, came in zip(matrix, unpack_tiles(tiles), strict=True))
    assert tiles.values.numel() == int(tiles.group_offsets[-1]) * GROUP


def test_zeros_are_kept() -> None:
    crow_indices, col_indices, values = csr(random_mask(5, 90, 0.4), BF16)
    values[::3], values[1::3] = 0.0, -0.0
    came = unpack_tiles(pack_tiles(crow_indices, col_indices, values, 90))
    assert torch.equal(came[1], col_indices) and torch.equal(came[2], values)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_lanes_write_to_different_banks(density: float) -> None:
    """How often a warp's write has to be repeated, on average: 3.5 times for places in their order."""
    tiles = pack_tiles(*csr(random_mask(128, 512, density), BF16), 512)
    nibbles = (tiles.gaps[:, None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    steps = (nibbles + 1).long() * STRIDE
    steps[:, 0] = tiles.places.long() & 0xFFFF
    places = steps.cumsum(1)
    assert int(places.max()) < PLACES + GROUP * STRIDE, "more is written behind a tile than the kernel has room for"
    repeats = []
    for begin, end in zip(tiles.group_offsets[:-1].tolist(), tiles.group_offsets[1:].tolist(), strict=True):
        for first in range(begin, end - 31, 32):
            words = places[first : first + 32] // 2
            for slot in range(GROUP):  # lanes that write to the same word do so at once
                banks = torch.unique(words[:, slot]) % 32
                repeats.append(int(torch.bincount(banks).max()))
    assert sum(repeats) / len(repeats) < 1.35


def test_refusals() -> None:
    crow_indices, col_indices, values = csr(random_mask(2, 9, 0.5), BF16)
    with pytest.raises(KernelError, match=r"bfloat16, which tensor cores multiply, got torch\.float32"):
        pack_tiles(crow_indices, col_indices, values.float(), 9)
    with pytest.raises(KernelError, match="as many values as column indices"):
        pack_tiles(crow_indices, col_indices, values[1:], 9)
    tiles = pack_tiles(crow_indices, col_indices, values, 9)
    for x in (torch.zeros(65, 9), torch.zeros(1, 8), torch.zeros(9), torch.zeros(9, 2).t()):
        with pytest.raises(KernelError, match=r"expected contiguous x \[at most 64, 9\]"):
            tensor_cores.multiply_tiles(tiles, x.to(BF16))
    with pytest.raises(KernelError, match=r"got x torch\.float32"):
        tensor_cores.multiply_tiles(tiles, torch.zeros(1, 9))
    with pytest.raises(KernelError, match=r"bias torch\.bfloat16"):
        tensor_cores.multiply_tiles(tiles, torch.zeros(1, 9, dtype=BF16), torch.zeros(3, dtype=BF16))
    with pytest.raises(KernelError, match="expected tensors on an NVIDIA GPU, got cpu"):
        tensor_cores.multiply_tiles(tiles, torch.zeros(1, 9, dtype=BF16))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the CUDA sources on the CPU with")
    variants = [variant for pair in KERNELS.values() for variant in pair]
    variants += [Variant("tiles.cu", "multiply_tiles", tuple(defines_of(n).items())) for n in (8, 16)]
    variants += [Variant("reduce.cu", "reduce", (("BF16", 1), ("WARPS", 8)))]
    variants += [tile_variants(*MISTAKES_IN, edit)[0] for edit in MUTANTS.values()]
    variants += [reduce_variant(BF16, edit) for edit in REDUCE_MUTANTS.values()]
    return Programs(tmp_path_factory.mktemp("gpu_on_cpu") / "tiles", variants)


class Problem:
    """A sparse weight, tokens and a bias; small whole numbers, or normally distributed ones."""

    def __init__(self, tokens: int, whole: bool) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            return (numbers * 1.5).round().to(BF16) if whole else numbers.to(BF16)

        self.mask = random_mask(ROWS, COLUMNS, 0.2)
        self.mask[:64, :256], self.mask[:64, 256:512], self.mask[66] = True, False, False
        self.weight = draw(ROWS, COLUMNS) * self.mask
        self.x, self.bias = draw(tokens, COLUMNS), draw(ROWS)
        self.exact = self.x.double() @ self.weight.double().T + self.bias.double()

    def tiles(self) -> Tiles:
        crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), self.mask.sum(1).cumsum(0)]).int()
        return pack_tiles(crow_indices, self.mask.nonzero()[:, 1].int(), self.weight[self.mask], COLUMNS)

    def check(self, y: Tensor) -> None:
        """|y - y64| <= gamma_k (|W||x| + |b|) for sums in float32, and one rounding more (see checkers.py).

        The products of a connection with what is zero in other columns are zeros, which no sum rounds.
        """
        size = self.x.double().abs() @ self.weight.double().abs().T + self.bias.double().abs()
        bound = (gamma(self.mask.sum(1) + 1, torch.float32) + gamma(self.mask.sum(1) + 1, torch.float64)) * size
        bound += unit_roundoff(BF16) * (self.exact.abs() + bound)
        assert y.isfinite().all() and bool(((y.double() - self.exact).abs() <= bound).all())


def everything(run) -> None:
    tokens = 3
    whole, normal = Problem(tokens, True), Problem(tokens, False)
    y = run(whole, parts=1)
    assert torch.equal(y, whole.exact.to(BF16)), "small whole numbers have one result"
    forwards = run(normal, parts=3)
    normal.check(forwards)
    # The order of the threads is not to be seen in the result.
    assert torch.equal(forwards, run(normal, parts=3, backwards=True))
    # What is not finite is multiplied by every weight, zeros too, of its own token alone.
    whole.x[1, 300] = torch.inf
    y = run(whole)
    assert not y[1].isfinite().any() and torch.equal(y[2:], whole.exact[2:].to(BF16))


@pytest.mark.parametrize("key", KERNELS, ids=str)
def test_multiply_tiles(programs: Programs, key) -> None:
    def run(problem: Problem, **options) -> Tensor:
        return multiply_tiles(programs, KERNELS[key], problem.tiles(), problem.x, problem.bias, **options)

    if key == SEEN_WHOLE:
        everything(run)
    full = Problem(key[0], True)
    assert torch.equal(run(full, parts=1), full.exact.to(BF16))


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_noticed(programs: Programs, name: str) -> None:
    wrong = tile_variants(*MISTAKES_IN, MUTANTS[name])

    def run(problem: Problem, **options) -> Tensor:
        return multiply_tiles(programs, wrong, problem.tiles(), problem.x, problem.bias, **options)

    with pytest.raises((AssertionError, RuntimeError)):
        everything(run)


@pytest.mark.parametrize("name", REDUCE_MUTANTS)
def test_mistakes_in_reduce_are_noticed(programs: Programs, name: str) -> None:
    kernels = KERNELS[8, 2][0], reduce_variant(BF16, REDUCE_MUTANTS[name])

    def run(problem: Problem, **options) -> Tensor:
        return multiply_tiles(programs, kernels, problem.tiles(), problem.x, problem.bias, **options)

    with pytest.raises((AssertionError, RuntimeError)):
        everything(run)


def test_launches(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the product down to the kernels: as many tokens at a time as shared memory holds, odd columns, no bias."""
    launcher = Launcher(programs, monkeypatch)
    monkeypatch.setattr(tensor_cores, "load", launcher.load)
    monkeypatch.setattr("offpath.kernels.gpu.reduce.load", launcher.load)
    monkeypatch.setattr(tensor_cores, "shared_bytes_limit", lambda device: 100_000)
    tensor_cores._plan.cache_clear()
    for tokens, columns, bias in ((5, COLUMNS, True), (5, COLUMNS - 3, True), (17, COLUMNS, False)):
        problem = Problem(tokens, True)
        mask, weight, x = problem.mask[:, :columns], problem.weight[:, :columns], problem.x[:, :columns].contiguous()
        crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
        tiles = pack_tiles(crow_indices, mask.nonzero()[:, 1].int(), weight[mask], columns)
        y = tensor_cores.multiply_tiles(tiles, x, problem.bias if bias else None)
        exact = x.double() @ weight.double().T + (problem.bias.double() if bias else 0)
        assert torch.equal(y, exact.to(BF16))
    tensor_cores._plan.cache_clear()
    of_products = [launch for launch in launcher.launches if launch[0] == "multiply_tiles"]
    assert of_products == [("multiply_tiles", (2, 2), 256)] * 4  # 17 tokens: 16 and one
    assert tensor_cores.multiply_tiles(tiles, x[:0]).shape == (0, ROWS)
    monkeypatch.setattr(tensor_cores, "shared_bytes_limit", lambda device: 70_000)
    with pytest.raises(KernelError, match="76,800 bytes of shared memory for a block, got one with 70,000"):
        tensor_cores.multiply_tiles(tiles, x)
    tensor_cores._plan.cache_clear()
