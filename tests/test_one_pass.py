"""What the products of one backward pass share is what each of them would have made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offpath.kernels import one_pass


def _copied(of: Tensor, size: int) -> Tensor:
    return of[:size].clone()


def _doubled(of: Tensor, size: int) -> Tensor:
    return 2 * of[:size]


class _InOnePass(torch.autograd.Function):
    """Runs something in its backward pass."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.run()
        return dy, None


def _in_one_pass(run: Callable[[], None]) -> None:
    _InOnePass.apply(torch.ones(1, requires_grad=True), run).sum().backward()


def _check(module: ModuleType) -> None:
    numbers, others = torch.arange(12, dtype=torch.int32), torch.arange(12, dtype=torch.int32).flip(0)
    views = [numbers, others, numbers[:2], numbers[:6], numbers[::2], numbers.view(torch.float32)]

    def right(of: Tensor, size: int = 3, make: Callable[[Tensor, int], Tensor] = _copied) -> None:
        got, made = module.once_in_a_pass(make, of, size), make(of, size)
        assert got.dtype is made.dtype and torch.equal(got, made)

    def all_of_them() -> None:
        for one in views:
            for other in views:
                right(one)
                right(other)
        right(numbers)
        right(numbers, 2)
        right(numbers, 2, _doubled)

    def written_into() -> None:
        right(numbers)
        numbers.add_(1)
        right(numbers)
        numbers[2:].view(2, 5).mul_(3)
        right(numbers)

    for run in (all_of_them, written_into, lambda: right(numbers)):
        run()
        _in_one_pass(run)
    numbers.data.add_(1)  # as a graph that is replayed: no version is raised
    _in_one_pass(lambda: right(numbers))

    def broken_off() -> None:
        right(numbers)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _in_one_pass(broken_off)
    numbers.data.add_(1)
    _in_one_pass(lambda: right(numbers))


def test_what_is_shared_is_right() -> None:
    _check(one_pass)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("key = make, backward_pass,", "key = make,"),
        ("key = make, backward_pass,", "key = backward_pass,"),
        ("of.data_ptr(), ", ""),
        ("of.shape, ", ""),
        ("of.stride(), ", ""),
        ("of.dtype, ", ""),
        (", of._version", ""),
        ("*memory, size", "*memory"),
    ],
)
def test_a_mutant_is_rejected(old: str, new: str) -> None:
    source = Path(one_pass.__file__).read_text()
    assert source.count(old) == 1
    mutant = ModuleType(one_pass.__name__)
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(mutant))
    with pytest.raises(AssertionError):
        _check(mutant)


def test_it_is_made_once_in_a_pass_and_forgotten_at_its_end() -> None:
    made: list[Tensor] = []
    numbers = torch.arange(4)

    def make(of: Tensor, size: int) -> int:
        made.append(of)
        return size

    def three_times() -> None:
        for _ in range(3):
            assert one_pass.once_in_a_pass(make, numbers, 5) == 5

    _in_one_pass(three_times)
    assert len(made) == 1 and not one_pass._last
    _in_one_pass(three_times)
    assert len(made) == 2
    three_times()
    assert len(made) == 5, "outside of a pass, nothing is kept"
    with torch.inference_mode():
        numbers = torch.arange(4)
    _in_one_pass(three_times)
    assert len(made) == 8, "tensors of inference mode do not count what is written into them"

    def alone() -> None:
        with one_pass.alone():
            three_times()

    numbers = torch.arange(4)
    _in_one_pass(alone)
    assert len(made) == 11 and not one_pass._thread.alone
