"""Every product of a convolution x backend x ISA x dtype x thread count, and that the checks can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from checkers import REFERENCE
from convolution_cases import (
    LAYOUTS,
    PROBLEMS,
    PRODUCTS,
    ConvolutionProblem,
    check_bounded,
    check_exact,
    drawn,
    run,
)
from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.kernels.convolution import Convolution
from problems import gaussian

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CHECKS = {"exact": check_exact, "bounded": check_bounded}


NATIVE = [name for name, backend in kernels.backends().items() if backend.native]


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products(product: str, backend: Backend, dtype: torch.dtype) -> None:
    """Each problem meets one layout with small integers and another one with Gaussian numbers."""
    layouts = list(LAYOUTS)
    for i, problem in enumerate(PROBLEMS):
        check_exact(product, backend, problem, layouts[i % 3], dtype)
        check_bounded(product, backend, problem, layouts[(i + 1) % 3], dtype)


@st.composite
def problems(draw: Callable) -> ConvolutionProblem:
    pair = lambda least, most: draw(st.tuples(*[st.integers(least, most)] * 2))  # noqa: E731
    groups, kernel, dilation = draw(st.integers(1, 3)), pair(1, 4), pair(1, 3)
    channels = [groups * draw(st.integers(1, 4)) for _ in range(2)]
    before, after = pair(0, 3), pair(0, 3)
    size = tuple(
        max(1, d * (k - 1) + 1 - b - a) + draw(st.integers(0, 9))
        for d, k, b, a in zip(dilation, kernel, before, after, strict=True)
    )
    sizes = Convolution(*channels, groups, size, kernel, pair(1, 4), before, after, dilation)
    return ConvolutionProblem(repr(sizes), sizes, draw(st.integers(0, 2)), draw(st.floats(0, 1)))


@settings(max_examples=100)
@given(problem=problems(), layout=st.sampled_from(list(LAYOUTS)), dtype=st.sampled_from(DTYPES))
def test_any_convolution(problem: ConvolutionProblem, layout: str, dtype: torch.dtype) -> None:
    for product in PRODUCTS:
        check_exact(product, kernels.default_backend()[0], problem, layout, dtype)


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
@pytest.mark.parametrize("product", PRODUCTS)
def test_results_do_not_depend_on_the_threads(product: str, backend: Backend, one_thread: None) -> None:
    problem = PROBLEMS[-1]
    operands = drawn(product, problem, "contiguous", gaussian(3, torch.float32))
    alone = run(product, backend, problem, operands, False)
    torch.set_num_threads(2)
    assert torch.equal(run(product, backend, problem, operands, False), alone)


def _shifted(c: Convolution) -> Convolution:
    (top, left), (bottom, right) = c.padding, c.padding_after
    return replace(c, padding=(top + 1, left), padding_after=(bottom - 1, right)) if bottom else c


_reference = REFERENCE.convolutions
MUTANTS = {
    "one row off": replace(
        _reference, prepare=lambda crow, col, c, dtype: _reference.prepare(crow, col, _shifted(c), dtype)
    ),
    "forgets the bias": replace(
        _reference, forward=lambda p, values, x, bias, last: _reference.forward(p, values, x, None, last)
    ),
    "no images are zero": replace(_reference, dx=lambda p, values, dy, last: _reference.dx(p, values, dy, last) + 1),
    "takes the neighbour's channel": replace(
        _reference, forward=lambda p, values, x, bias, last: _reference.forward(p, values, x.roll(1, 1), bias, last)
    ),
    "mirrors the kernel": replace(
        _reference, dx=lambda p, values, dy, last: _reference.dx(p, values.flip(0), dy, last)
    ),
    "last image only": replace(_reference, dvalues=lambda p, dy, x: _reference.dvalues(p, dy[-1:], x[-1:])),
    "skips the last pixel": replace(
        _reference,
        dvalues=lambda p, dy, x: _reference.dvalues(p, dy * (torch.arange(dy.shape[3]) < dy.shape[3] - 1), x),
    ),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, check: str) -> None:
    def rejections(backend: Backend) -> int:
        count = 0
        for product in PRODUCTS:
            for problem in PROBLEMS[:6]:
                try:
                    CHECKS[check](product, backend, problem, "contiguous", torch.float32)
                except AssertionError:
                    count += 1
        return count

    assert rejections(replace(REFERENCE, name=f"mutant: {mutant}", convolutions=MUTANTS[mutant])) > 0


def test_the_definition_is_accepted() -> None:
    for check in CHECKS.values():
        for product in PRODUCTS:
            check(product, REFERENCE, PROBLEMS[1], "contiguous", torch.float32)


@pytest.mark.parametrize("backend", NATIVE, indirect=True)
def test_wrong_operands_are_refused(backend: Backend) -> None:
    problem = PROBLEMS[1]
    operands = drawn("forward", problem, "contiguous", gaussian(0, torch.float32))
    run("forward", backend, problem, operands, False)
    for wrong in (
        {"x": operands["x"][:, 1:]},
        {"x": operands["x"].double()},
        {"values": operands["values"][1:]},
        {"bias": operands["bias"][1:]},
    ):
        with pytest.raises(KernelError, match="expected dense CPU tensors"):
            run("forward", backend, problem, operands | wrong, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_of_another_isa_are_refused_or_read_as_they_are(dtype: torch.dtype) -> None:
    problem, native = PROBLEMS[1], [kernels.backends()[name].convolutions for name in NATIVE]
    pattern, draw = problem.pattern, gaussian(0, dtype)
    x, dy = (drawn(product, problem, "contiguous", draw)[of] for product, of in (("forward", "x"), ("dx", "dy")))
    values = draw((pattern.nnz,))
    for made in native:
        plan = made.prepare(pattern.crow_indices, pattern.col_indices, problem.convolution, dtype)
        for own in native:
            of_own = own.prepare(pattern.crow_indices, pattern.col_indices, problem.convolution, dtype)
            for run_over in (
                lambda plan, own=own: own.forward(plan, values, x, None, False),
                lambda plan, own=own: own.dx(plan, values, dy, False),
                lambda plan, own=own: own.dvalues(plan, dy, x),
            ):
                try:
                    found = run_over(plan)
                except ValueError as error:
                    assert "another dtype or ISA" in str(error)
                    continue
                assert torch.equal(found, run_over(of_own))


def test_blocks_beyond_int32_are_refused() -> None:
    backend = kernels.backends()[NATIVE[-1]]
    huge = ConvolutionProblem(
        "huge", Convolution(64, 1, 1, (40_000, 40_000), (2, 1), (1, 1), (0, 0), (0, 0), (39_999, 1)), 1, 0.1
    )
    pattern = huge.pattern
    prepared = backend.convolutions.prepare(pattern.crow_indices, pattern.col_indices, huge.convolution, torch.float32)
    with pytest.raises(ValueError, match="2\\^31 entries"):
        prepared.forward  # noqa: B018


def test_sizes_that_do_not_fit_are_refused() -> None:
    fits = PROBLEMS[1].convolution
    for wrong in (
        {"groups": 2},
        {"in_channels": 0},
        {"out_channels": 0},
        {"stride": (0, 1)},
        {"size": (0, 3)},
        {"padding": (-1, 0)},
        {"dilation": (9, 1)},
    ):
        with pytest.raises(KernelError, match="expected"):
            replace(fits, **wrong)
