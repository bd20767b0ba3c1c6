"""The bytes that training keeps: parameters, gradients, optimizer state, patterns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offpath.ops import prepared_bytes


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes by what they are for; `pattern` is all that the topology takes: indices, copies, transposes, plans."""

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

    Optimizer state and plans are made in the first step: call this after it.

    >>> model = nn.Linear(3, 2)
    >>> training_bytes(model, torch.optim.SGD(model.parameters(), lr=0.1))
    TrainingBytes(parameters=32, gradients=32, optimizer=0, pattern=0)
    """
    parameters, buffers = list(model.parameters()), dict(model.named_buffers())
    columns = [tensor for name, tensor in buffers.items() if name.split(".")[-1] == "col_indices"]
    return TrainingBytes(
        parameters=_bytes(parameters),
        gradients=_bytes(p for p in parameters if p.requires_grad),
        optimizer=_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        pattern=_bytes(t for name, t in buffers.items() if name.split(".")[-1] in ("crow_indices", "col_indices"))
        + sum(prepared_bytes(tensor) for tensor in columns),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
