"""Numbers that a module averages over many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

_Self = TypeVar("_Self", bound="KeepsStatistics")


def is_recomputing() -> bool:
    """Whether a backward pass runs this forward pass once more, as activation checkpointing does.

    Its samples have been counted. (A compiler that recomputes has its own copy of what it reads.)
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


class KeepsStatistics(nn.Module):
    """A module whose buffers stay in float32 where the rest goes to 16 bits.

    What one step adds to a running average is often smaller than the rounding of a 16-bit number, and would be lost.
    """

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if buffer.element_size() > after.element_size() and after.element_size() < 4:
                setattr(self, name, buffer.float().to(after.device))
        return self
