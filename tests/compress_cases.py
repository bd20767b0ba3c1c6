"""What the tests of `compress` share: a pruned model, all that must stay of one, and measurements that are brief."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

# By their full names: `offpath.convert.compress` is the function.
COMPRESS, CONTEST, ENCODERS, FINISH = (
    importlib.import_module(f"offpath.convert.compress.{m}") for m in ("compress", "contest", "encoders", "finish")
)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTEST, "BUDGET_SECONDS", 0.0)
    for timing in (ENCODERS, FINISH):
        monkeypatch.setattr(timing, "ROUNDS", 1)


def set_to_zero(weight: torch.Tensor, sparsity: float = 0.9) -> None:
    """Zero out that share of the smallest entries."""
    with torch.no_grad():
        smallest = weight.abs().flatten().topk(round(sparsity * weight.numel()), largest=False).indices
        weight.view(-1)[smallest] = 0


def pruned_model(sparsity: float = 0.9) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(96, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 64, bias=False)), nn.Linear(64, 4)
    )
    for layer in (model[0], model[2][0]):
        set_to_zero(layer.weight, sparsity)
    return model


def snapshot(model: nn.Module) -> list:
    """All that must be the same when nothing was changed: the modules themselves, tensors, modes and hooks."""
    tensors = [(name, id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    hooks = [[len(v) for k, v in vars(m).items() if "_hooks" in k and isinstance(v, dict)] for m in model.modules()]
    return [[(n, id(m), m.training) for n, m in model.named_modules()], hooks, tensors]


def same(before: list, after: list) -> bool:
    equal = all(
        a[:2] == b[:2] and (a[2].is_meta or torch.equal(a[2].nan_to_num(), b[2].nan_to_num()))
        for a, b in zip(before[2], after[2], strict=True)
    )
    return equal and before[:2] == after[:2]
