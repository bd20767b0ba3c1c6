"""Ops without the way through the dispatcher: the same numbers and gradients, and none where somebody listens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from offpath.ops import library
from offpath.ops.library import direct

ROWS = torch.tensor([0, 2, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 1, 2, 3], dtype=torch.int32)
WEIGHT = torch.tensor([0, 1, 3, 3, 4], dtype=torch.int32), torch.tensor([1, 0, 2, 1], dtype=torch.int32)
SIZES = (2, 2), (1, 1), (0, 1, 1, 0), (1, 1), 1, "speed"
CONNECTIONS = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([0, 2, 7, 5], dtype=torch.int32)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


OPERANDS = {
    "rows_matmul": lambda: (drawn(5), *ROWS, drawn(4, 2)),
    "rows_dots": lambda: (drawn(3, 2), *ROWS, drawn(4, 2)),
    "rows_weight_gradient": lambda: (drawn(5), *ROWS, drawn(3, 2), 4),
    "rows_encoder_gradients": lambda: (drawn(5), *ROWS, drawn(3, 2), 4),
    "rows_gradients": lambda: (drawn(3, 2), drawn(5), *ROWS, drawn(4, 2)),
    "topk_rows": lambda: (drawn(3, 6), 2),
    "batch_topk": lambda: (drawn(3, 6), 7),
    "above": lambda: (drawn(3, 6), torch.zeros(6, dtype=torch.float64)),
    "encode_topk": lambda: (drawn(3, 4), drawn(6, 4), drawn(6), 2),
    "rows_sparse_matmul": lambda: (drawn(5), *ROWS, drawn(4), *WEIGHT, 3),
    "rows_sparse_dots": lambda: (drawn(3, 3), *ROWS, drawn(4), *WEIGHT),
    "rows_sparse_weight_gradient": lambda: (drawn(5), *ROWS, drawn(3, 3), *WEIGHT),
    "sparse_conv2d": lambda: (drawn(1, 2, 4, 4), drawn(4), drawn(2), *CONNECTIONS, *SIZES),
    "sparse_conv2d_dx": lambda: (drawn(1, 2, 4, 4), drawn(4), *CONNECTIONS, [1, 2, 4, 4], False, *SIZES),
    "sparse_conv2d_dvalues": lambda: (drawn(1, 2, 4, 4), drawn(1, 2, 4, 4), *CONNECTIONS, *SIZES),
}
WITHOUT_GRADIENT = {"int8_linear", "packed_linear", "live_linear"}


def _tensors(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _results(op, operands: tuple) -> Iterator[Tensor]:
    """What comes out, and first and second derivatives."""
    outputs = _tensors(op(*operands))
    yield from outputs
    inputs = [one for one in operands if isinstance(one, Tensor) and one.requires_grad]
    total = sum(one.square().sum() for one in outputs if one.requires_grad)
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    yield from gradients
    yield from torch.autograd.grad(sum(one.square().sum() for one in gradients), inputs)


def test_every_op_is_here() -> None:
    assert set(vars(direct)) == {*OPERANDS, *WITHOUT_GRADIENT}


@pytest.mark.parametrize("name", OPERANDS)
def test_derivatives_are_those_of_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the same kernels compute them."""
    operands = OPERANDS[name]()
    op = getattr(torch.ops.offpath, name)
    got = list(_results(getattr(direct, name), operands))
    monkeypatch.setattr(library, "nobody_listens", lambda *_: False)
    for one, right in zip(got, _results(op, operands), strict=True):
        assert torch.equal(one, right) and one.requires_grad == right.requires_grad
    with torch.no_grad():
        for one, right in zip(_tensors(getattr(direct, name)(*operands)), _tensors(op(*operands)), strict=True):
            assert torch.equal(one, right) and not one.requires_grad


@pytest.mark.parametrize("name", OPERANDS)
def test_nothing_is_called_on_the_way(name: str) -> None:
    """Neither in the forward nor in the backward pass: torch's profiler, which would listen, is told afterwards."""
    called: list[str] = []
    op = getattr(torch.ops.offpath, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(op.default), "__call__", lambda self, *_, **__: called.append(str(self)))
        outputs = _tensors(getattr(direct, name)(*OPERANDS[name]()))
        sum(one.square().sum() for one in outputs if one.requires_grad).backward()
    assert not called


@pytest.mark.parametrize("name", OPERANDS)
def test_who_listens_hears_of_it(name: str) -> None:
    with torch.profiler.profile() as profile:
        getattr(direct, name)(*OPERANDS[name]())
    assert f"offpath::{name}" in {event.key for event in profile.key_averages()}
