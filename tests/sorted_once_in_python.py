"""Gradients on a GPU that share one sort of their entries, run in Python as in `triton_in_python.py`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels.gpu import counting_sort
from offpath.nn import SparseAutoencoder
from triton_in_python import mutated

ROWS = torch.tensor([0, 2, 3], dtype=torch.int32)
DY = torch.tensor([[1.0], [10.0]])


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The indices of each sort."""
    sorted_ones: list[Tensor] = []
    sort = counting_sort._sort
    monkeypatch.setattr(
        counting_sort, "_sort", lambda indices, columns: (sorted_ones.append(indices), sort(indices, columns))[1]
    )
    return sorted_ones


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_a_step_of_an_autoencoder_sorts_its_entries_once(activation: str, sorts: list[Tensor]) -> None:
    sae = SparseAutoencoder(6, 10, k=2, activation=activation, aux_coefficient=0)
    x, gradients = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), []
    for backend in ("reference", "gpu:interpreted"):
        sae.zero_grad()
        with kernels.forced(backend):
            sae.loss(x).total.backward()
        gradients.append([parameter.grad for parameter in sae.parameters()])
    assert len(sorts) == 1 and not counting_sort._last
    for right, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right)


class _Gradients(torch.autograd.Function):
    """In its backward pass, the gradients of rows that name these places, one after another."""

    @staticmethod
    def forward(ctx, x, module, places, columns, found, between):
        ctx.rest = module, places, columns, found, between
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        module, places, columns, found, between = ctx.rest
        for number, indices in enumerate(places):
            if number:
                between(indices)
            found.append(module.weight_gradient(ROWS, indices, torch.ones(3), DY, columns[number]))
        return dy, None, None, None, None, None


def _right(indices: Tensor, columns: int) -> Tensor:
    return torch.zeros(columns, 1).index_add_(0, indices.long(), DY[[0, 0, 1]])


def _check(module: ModuleType) -> None:
    def gradients(places: list[Tensor], columns: tuple[int, ...] = (4, 4), between=lambda _: None) -> list[Tensor]:
        x, found = torch.ones(1, requires_grad=True), []
        _Gradients.apply(x, module, places, columns, found, between).sum().backward()
        return found

    first, second = (torch.tensor(places, dtype=torch.int32) for places in ([0, 1, 3], [3, 2, 0]))
    for places in ([first, second], [second, first], [first, first], [first[:], first.view(3)]):
        for got, indices in zip(gradients(places), places, strict=True):
            assert torch.equal(got, _right(indices, 4))
    for got, columns in zip(gradients([first, first], (4, 6)), (4, 6), strict=True):
        assert torch.equal(got, _right(first, columns))
    every_other = torch.tensor([0, 3, 1, 3, 2, 3], dtype=torch.int32)
    for got, indices in zip(gradients(views := [every_other[:3], every_other[::2]]), views, strict=True):
        assert torch.equal(got, _right(indices, 4))
    # Written in place between two gradients of one pass, and between two passes by who raises no version.
    got = gradients([first, first], between=lambda indices: indices.copy_(second))
    assert torch.equal(got[1], _right(second, 4))
    kept = first.clone()
    gradients([kept, kept])
    kept.data.copy_(torch.tensor([1, 1, 1]))
    assert torch.equal(gradients([kept, kept])[1], _right(kept, 4))
    with pytest.raises(ZeroDivisionError):  # a pass that does not come to its end
        gradients([kept, kept], between=lambda _: 1 / 0)
    kept.data.copy_(torch.tensor([3, 3, 0]))
    assert torch.equal(gradients([kept])[0], _right(kept, 4))


def test_what_is_sorted_serves_the_same_entries_of_one_pass() -> None:
    _check(counting_sort)
    assert not counting_sort._last, "what was sorted outlives the pass"
    with torch.inference_mode():
        indices = torch.tensor([1, 2, 2], dtype=torch.int32)
        counting_sort.weight_gradient(ROWS, indices, torch.ones(3), DY, 4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("key = backward_pass, stream", "key = 0, stream"),
        ("indices.data_ptr(), indices", "indices"),
        (", indices._version", ""),
        ("indices.stride(0), ", ""),
    ],
)
def test_a_mutant_is_rejected(old: str, new: str, tmp_path: Path) -> None:
    mutant = mutated(counting_sort, old, new, tmp_path)
    with pytest.raises(AssertionError):
        _check(mutant)
