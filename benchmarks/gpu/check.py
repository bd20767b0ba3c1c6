"""One call of a kernel judged: against float64, over poisoned memory, twice, and replayed from a CUDA graph."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpu.sheet import Check
from gpu.timing import captured, is_of_an_earlier_capture
from offpath.cost.bounds import HALF_PRECISION, Expected, excess, expected

# Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to the nearest.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Case:
    """A call, the results that it has to come to, and its inputs that other numbers may be written into.

    `right` is asked once, before `inputs` change. Results of whole numbers have a bound of 0.
    """

    kernel: str
    name: str
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    right: Callable[[], Sequence[Expected]]
    inputs: tuple[Tensor, ...] = ()
    captured: bool = True


def judge(case: Case, replayed: bool = True) -> Check:
    """Everything that is wrong with one case, CUDA graphs left out unless `replayed`."""
    try:
        with poisoned():
            results = _results(case)
        right = case.right()
        problems = [*_far_off(results, right)]
        error = max((frobenius(*pair) for pair in zip(results, right, strict=True)), default=0.0)
        if not _same_bits(results, _results(case)):
            problems.append("a second call gave other bits")
        if replayed and case.captured and results[0].is_cuda:
            problems += _replay(case)
    except Exception as problem:  # Triton's are of no common kind; a case that fails must not take the others along
        return Check(case.kernel, case.name, None, (f"{type(problem).__name__}: {problem}".split("\n")[0],))
    return Check(case.kernel, case.name, error, tuple(problems))


@contextmanager
def poisoned() -> Iterator[None]:
    """Let fresh memory hold NaN, or the largest number of an integer type, so that an unwritten output shows."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    was, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own ops that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextmanager
def summed_in_float32() -> Iterator[None]:
    """Keep cuBLAS from adding parts of a sum up in bfloat16, as it may by default; it is timed as it comes."""
    settings = torch.backends.cuda.matmul
    was = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = was


def sums(exact: Tensor, size: Tensor, terms: Tensor, dtype: torch.dtype) -> Expected:
    """What a sum of `terms` products may come to, `size` being that of their absolute values."""
    right = expected(exact, size, terms, dtype)
    if INTERPRETED and dtype in HALF_PRECISION:
        right = replace(right, bound=right.bound + (torch.finfo(dtype).eps / 2) * (exact.abs() + right.bound))
    return right


def exactly(result: Tensor) -> Expected:
    """This and nothing else."""
    result = result.double()
    return Expected(result, torch.zeros_like(result))


def frobenius(result: Tensor, right: Expected) -> float:
    """The norm of the error as a share of that of the result."""
    if result.shape != (right.exact.shape if right.shape is None else right.shape):
        return float("inf")
    norm = float(right.exact.norm())
    off = float((result[right.index].double() - right.exact).norm())
    return off / norm if norm else off


def _results(case: Case) -> tuple[Tensor, ...]:
    results = case.call()
    return results if isinstance(results, tuple) else (results,)


def _far_off(results: Sequence[Tensor], right: Sequence[Expected]) -> Iterator[str]:
    for number, (result, wanted) in enumerate(zip(results, right, strict=True)):
        times = excess(result, wanted)
        if times is not None:
            yield f"result {number} is off by {times:.3g} times its bound"


def _same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(one, other, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(whole[tensor.element_size()])


def _replay(case: Case) -> list[str]:
    kept: list[tuple[Tensor, ...]] = []
    try:
        replay = captured(lambda: kept.append(_results(case)))
    except RuntimeError as problem:
        torch.cuda.synchronize()
        if is_of_an_earlier_capture(problem):
            return []  # that one is told of
        return [f"cannot be captured in a CUDA graph: {problem}".split("\n")[0]]
    for tensor in case.inputs:
        tensor.copy_(tensor.roll(1, 0).neg())
    replay()
    torch.cuda.synchronize()
    return [] if _same_bits(kept[-1], _results(case)) else ["a replay over other inputs gave other bits than a call"]
