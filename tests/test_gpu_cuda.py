"""The CUDA sources without a GPU: run on the CPU under the sanitizers, right, and with mistakes made on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checkers import gamma, unit_roundoff
from gpu_on_cpu import COMPILER, Programs, Variant, decode, decode_variant, live, live_variants
from offpath.kernels.gpu.formats import Kind, pack
from test_gpu_formats import KINDS, random_mask

# Reads past its last column when it is packed at full width, has an empty row, and rows of many lengths.
ROWS, COLUMNS = 21, 531
DECODERS = {
    (kind, dtype, batch): decode_variant(kind, dtype, batch)
    for kind, dtype, batch in [
        *(("n4", torch.bfloat16, batch) for batch in (1, 2, 4, 8)),
        *(("n4", torch.float32, batch) for batch in (1, 4)),
        *(("c16", torch.bfloat16, batch) for batch in (1, 4)),
        ("c16", torch.float32, 8),
    ]
}
UNSTAGED = {kind: decode_variant(kind, torch.float32, 2, staged=False) for kind in KINDS}
LIVES = {
    (torch.bfloat16, 1): live_variants(torch.bfloat16, 1),
    (torch.bfloat16, 4): live_variants(torch.bfloat16, 4),
    (torch.float32, 2): live_variants(torch.float32, 2),
}

# Mistakes in the sources, which the checks below must notice.
DECODE_MUTANTS = {
    "a gap is one unit short": ("place + (slot << GAP_SHIFT)", "place"),
    "the last lanes are left out": ("if (first + 32 * i + lane < end)", "if (first + 32 * (i + 1) <= end)"),
    "a row reads what was loaded for another": ("const int group = next_begin + 32", "const int group = begin + 32"),
    "sums are added to the next row": ("sums[token] = 0.0f;", "if (row < step) sums[token] = 0.0f;"),
    "half of the lanes are summed": ("int distance = 16", "int distance = 8"),
    "the bias is forgotten": ("(bias ? widen(bias[row]) : 0.0f)", "0.0f"),
    "rounded towards zero": ("bits + 0x7fffu + (bits >> 16 & 1u)", "bits"),
    "fillers are multiplied": ("if (GUARDED && is_filler(group, slot))", "if (false)"),
    "every zero is taken for a filler": ("== 0x80000000u", "<< 1 == 0u"),
    "what is behind x is not cleared": ("word < GROUP * STRIDE * X_WORDS", "word < 0"),
    "no barrier after staging": ("if (!__syncthreads_or(strange))", "if (!strange)"),
}
LIVE_MUTANTS = {
    "a live input is skipped": ("is_live |= values[token] != 0.0f;", "is_live = values[token] != 0.0f;"),
    "NaN is not live": ("values[token] != 0.0f;", "(values[token] < 0.0f || values[token] > 0.0f);"),
    "a place in the list is used twice": ("(1u << lane) - 1u", "(1u << lane / 2 * 2) - 1u"),
    "the list is read before it is written": (
        "            __syncthreads();\n        }\n        for",
        "        }\n        for",
    ),
    "the warps' sums are not waited for": ("        __syncthreads();\n        for (int i", "        for (int i"),
    "one warp's sum is left out": ("sum += sums_of_warps[other][i];", "if (other) sum += sums_of_warps[other][i];"),
}


def mutated(source: str, mutants: dict[str, tuple[str, str]]) -> list[Variant]:
    if source == "live.cu":
        return [live_variants(torch.bfloat16, 4, edit)[0] for edit in mutants.values()]
    return [decode_variant("n4", torch.bfloat16, 2, edit=edit) for edit in mutants.values()]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    if COMPILER is None:
        pytest.skip("no C++ compiler to run the CUDA sources on the CPU with")
    variants = [*DECODERS.values(), *UNSTAGED.values(), *(variant for pair in LIVES.values() for variant in pair)]
    variants += mutated("decode.cu", DECODE_MUTANTS) + mutated("live.cu", LIVE_MUTANTS)
    return Programs(tmp_path_factory.mktemp("gpu_on_cpu") / "kernels", variants)


class Problem:
    """A sparse weight (`mask` says where), tokens and a bias; small whole numbers, or normally distributed ones."""

    def __init__(self, dtype: torch.dtype, tokens: int, whole: bool, density: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            if whole:
                return torch.randint(-3, 4, shape, generator=generator).to(dtype)
            return torch.randn(shape, generator=generator).to(dtype)

        self.mask = random_mask(ROWS, COLUMNS, density)
        self.mask[3], self.mask[4], self.mask[5, ::19] = False, True, True
        self.mask[6, :] = False
        self.mask[6, [0, 400, COLUMNS - 1]] = True
        self.weight = draw(ROWS, COLUMNS) * self.mask
        self.x, self.bias = draw(tokens, COLUMNS), draw(ROWS)

    def packed(self, kind: Kind):
        crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), self.mask.sum(1).cumsum(0)]).int()
        return pack(crow_indices, self.mask.nonzero()[:, 1].int(), self.weight[self.mask], COLUMNS, kind)

    def check(self, y: Tensor) -> None:
        """|y - y64| <= gamma_k (|W||x| + |b|) for sums in float32, and one rounding more (see checkers.py)."""
        w, x, b = self.weight.double(), self.x.double(), self.bias.double()
        exact, size = x @ w.T + b, x.abs() @ w.abs().T + b.abs()
        terms = self.mask.sum(1) + 1
        bound = (gamma(terms, torch.float32) + gamma(terms, torch.float64)) * size
        if y.dtype is torch.bfloat16:
            bound += unit_roundoff(y.dtype) * (exact.abs() + bound)
        assert y.isfinite().all() and bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("key", DECODERS, ids=str)
def test_decode(programs: Programs, key) -> None:
    kind, dtype, batch = key
    for tokens in {batch, batch // 2 + 1}:
        whole, normal = Problem(dtype, tokens, True), Problem(dtype, tokens, False)
        y = decode(programs, DECODERS[key], whole.packed(kind), whole.x, whole.bias)
        expected = whole.x.double() @ whole.weight.double().T + whole.bias.double()
        assert torch.equal(y, expected.to(dtype)), "small whole numbers have one result"
        packed = normal.packed(kind)
        forwards = decode(programs, DECODERS[key], packed, normal.x, normal.bias)
        normal.check(forwards)
        # Neither the order of the threads nor the number of blocks is to be seen in the result.
        backwards = decode(programs, DECODERS[key], packed, normal.x, normal.bias, blocks=5, backwards=True)
        assert torch.equal(forwards, backwards)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_with_x_in_global_memory(programs: Programs, kind: Kind) -> None:
    problem = Problem(torch.float32, 2, False)
    problem.check(decode(programs, UNSTAGED[kind], problem.packed(kind), problem.x, problem.bias))


def hostile(problem: Problem, run) -> None:
    """What is not finite in x reaches the rows that are connected to it, as NaN or infinity, and no others."""
    strange = {0: torch.inf, COLUMNS - 1: torch.nan, 64: -torch.inf, 250: torch.nan}
    for column, value in strange.items():
        problem.x[0, column] = value
    y = run(problem)
    with_zeros = problem.x.double().nan_to_num(0, 0, 0) @ problem.weight.double().T + problem.bias.double()
    touched = problem.mask[:, list(strange)].any(1)
    assert not y[0, touched].isfinite().any(), "a value that is not finite got lost"
    assert torch.equal(y[0, ~touched], with_zeros[0, ~touched].to(y.dtype))
    assert torch.equal(y[1:], with_zeros[1:].to(y.dtype)), "a token changed another one"


@pytest.mark.parametrize("variant", [*DECODERS.items(), *UNSTAGED.items()], ids=lambda item: str(item[0]))
def test_what_x_holds_elsewhere_does_not_matter(programs: Programs, variant) -> None:
    key, program = variant
    kind, dtype, batch = key if isinstance(key, tuple) else (key, torch.float32, 2)
    problem = Problem(dtype, batch, True)
    problem.weight[problem.mask & (problem.weight == 0)] = 1.0  # zero times infinity is its own case, below
    hostile(problem, lambda p: decode(programs, program, p.packed(kind), p.x, p.bias))


def zero_times_infinity(run) -> None:
    problem = Problem(torch.bfloat16, 2, True)
    problem.weight[4, 7], problem.x[0, 7] = 0.0, torch.inf
    y = run(problem)
    assert bool(y[0, 4].isnan()), "a stored zero is a connection"


def test_a_stored_zero_is_a_connection(programs: Programs) -> None:
    for kind, batch in (("n4", 2), ("c16", 4)):
        variant = DECODERS[kind, torch.bfloat16, batch]
        zero_times_infinity(lambda p, kind=kind, v=variant: decode(programs, v, p.packed(kind), p.x, p.bias))


def test_an_overflow_is_infinity_and_the_bias_may_be_missing(programs: Programs) -> None:
    problem = Problem(torch.bfloat16, 1, True)
    problem.weight[4], problem.x[:] = 3e38, 3e38
    y = decode(programs, DECODERS["n4", torch.bfloat16, 1], problem.packed("n4"), problem.x)
    assert y[0, 4] == torch.inf and y[0, 3] == 0


@pytest.mark.parametrize("name", DECODE_MUTANTS)
def test_mistakes_in_decode_are_noticed(programs: Programs, name: str) -> None:
    variant = decode_variant("n4", torch.bfloat16, 2, edit=DECODE_MUTANTS[name])

    def run(problem: Problem, **options) -> Tensor:
        return decode(programs, variant, problem.packed("n4"), problem.x, problem.bias, **options)

    def everything() -> None:
        normal = Problem(torch.bfloat16, 2, False)
        for options in ({}, {"blocks": 5, "backwards": True}):
            normal.check(run(normal, **options))
        whole = Problem(torch.bfloat16, 2, True)
        y = run(whole)
        assert torch.equal(y, (whole.x.double() @ whole.weight.double().T + whole.bias.double()).to(y.dtype))
        whole.weight[whole.mask & (whole.weight == 0)] = 1.0
        hostile(whole, run)
        zero_times_infinity(run)

    with pytest.raises((AssertionError, RuntimeError)):
        everything()


class LiveProblem:
    """Tokens with many zeros times a dense weight."""

    def __init__(self, dtype: torch.dtype, tokens: int, density: float = 0.4, whole: bool = False) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> torch.Tensor:
            some = (
                torch.randint(-3, 4, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
            )
            return some.to(dtype)

        self.weight, self.bias = draw(410, 264), draw(264)
        self.x = draw(tokens, 410) * (torch.rand(tokens, 410, generator=generator) < density)
        # What is not used may be anything.
        self.weight[~(self.x != 0).any(0)] = torch.nan

    def check(self, y: Tensor) -> None:
        w = self.weight.double().nan_to_num(0)
        x, b = self.x.double(), self.bias.double()
        exact, size = x @ w + b, x.abs() @ w.abs() + b.abs()
        terms = (self.x != 0).any(0).sum() + 1
        bound = (gamma(terms, torch.float32) + gamma(terms, torch.float64)) * size
        if y.dtype is torch.bfloat16:
            bound += unit_roundoff(y.dtype) * (exact.abs() + bound)
        assert y.isfinite().all() and bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("key", LIVES, ids=str)
def test_live(programs: Programs, key) -> None:
    dtype, batch = key
    for tokens, density in ((batch, 0.4), (batch // 2 + 1, 1.0), (batch, 0.0)):
        problem = LiveProblem(dtype, tokens, density)
        forwards = live(programs, LIVES[key], problem.x, problem.weight, problem.bias)
        problem.check(forwards)
        backwards = live(programs, LIVES[key], problem.x, problem.weight, problem.bias, backwards=True)
        assert torch.equal(forwards, backwards)
        whole = LiveProblem(dtype, tokens, density, whole=True)
        y = live(programs, LIVES[key], whole.x, whole.weight, None, parts=2)
        assert torch.equal(y, (whole.x.double() @ whole.weight.double().nan_to_num(0)).to(dtype))


def nan_is_live(run) -> None:
    problem = LiveProblem(torch.bfloat16, 3)
    problem.x[:, 100], problem.weight[100] = 0.0, 1.0
    problem.x[1, 100] = torch.nan
    y = run(problem)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_nan_is_live(programs: Programs) -> None:
    variants = LIVES[torch.bfloat16, 4]
    nan_is_live(lambda p: live(programs, variants, p.x, p.weight, p.bias))


@pytest.mark.parametrize("name", LIVE_MUTANTS)
def test_mistakes_in_live_are_noticed(programs: Programs, name: str) -> None:
    wrong, right = live_variants(torch.bfloat16, 4, LIVE_MUTANTS[name])

    def run(problem: LiveProblem, **options) -> Tensor:
        return live(programs, (wrong, right), problem.x, problem.weight, problem.bias, **options)

    def everything() -> None:
        problem = LiveProblem(torch.bfloat16, 4)
        for backwards in (False, True):
            problem.check(run(problem, backwards=backwards))
        nan_is_live(run)

    with pytest.raises((AssertionError, RuntimeError)):
        everything()
