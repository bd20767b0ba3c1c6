"""The bytes that training keeps: parameters, gradients, optimizer state, patterns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offpath.pattern import Pattern


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes by what they are for; `pattern` is the sparse layers' index arrays, copies and transposes included."""

    parameters: int
    gradients: int
    optimizer: int
    pattern: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.pattern


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingBytes:
    """Count what training `model` with `optimizer` keeps between steps, gradients of every trained parameter included.

    Optimizers make their state in the first step: call this after it.

    >>> model = nn.Linear(3, 2)
    >>> training_bytes(model, torch.optim.SGD(model.parameters(), lr=0.1))
    TrainingBytes(parameters=32, gradients=32, optimizer=0, pattern=0)
    """
    parameters = list(model.parameters())
    patterns = [p for m in model.modules() if isinstance(p := getattr(m, "pattern", None), Pattern)]
    for pattern in patterns:
        pattern.transpose()
    return TrainingBytes(
        parameters=_bytes(parameters),
        gradients=_bytes(p for p in parameters if p.requires_grad),
        optimizer=_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        # Once as the layer's buffers, and once as the private copy with its transpose that the kernels work on.
        pattern=sum(pattern.index_bytes + _bytes((pattern.crow_indices, pattern.col_indices)) for pattern in patterns),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
