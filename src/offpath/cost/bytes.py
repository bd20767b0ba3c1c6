"""The bytes that training keeps: parameters, gradients, optimizer state, patterns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from offpath.ops import Connections


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
    parameters = list(model.parameters())
    return TrainingBytes(
        parameters=_bytes(parameters),
        gradients=_bytes(p for p in parameters if p.requires_grad),
        optimizer=_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        pattern=sum(connections.bytes for connections in _connections(model)),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, buffers and index arrays of `model`, each counted once.

    >>> model_bytes(nn.Linear(3, 2))
    32
    """
    tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return _bytes(tensors.values()) + sum(connections.index_bytes for connections in _connections(model))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model` and of all that its topologies take: indices, transposes, plans.

    Plans are made in the first call that needs them.

    >>> memory_bytes(nn.Linear(3, 2))
    32
    """
    tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return _bytes(tensors.values()) + sum(connections.bytes for connections in _connections(model))


def _connections(model: nn.Module) -> list[Connections]:
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Connections)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if not is_lazy(t))
