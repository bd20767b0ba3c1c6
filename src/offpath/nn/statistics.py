"""Numbers that a module averages over many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from offpath.nn.casts import keep_dtypes

_Self = TypeVar("_Self", bound="KeepsStatistics")


def is_recomputing() -> bool:
    """Whether activation checkpointing runs this forward pass once more, inside of a backward pass.

    Its samples have been counted. (A compiler that recomputes has its own copy of what it reads.)
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return False
    # Others train in a backward pass as well. torch has no question for it: one kind of checkpoint is a node of the
    # graph, the other one fills its saved tensors through hooks of this name.
    node = torch._C._current_autograd_node()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    by_hooks = hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")
    return by_hooks or (node is not None and node.name() == "CheckpointFunctionBackward")


class KeepsStatistics(nn.Module):
    """A module whose buffers stay in float32 where the rest goes to 16 bits, and whole numbers where they are counts.

    What one step adds to a running average is often smaller than the rounding of a 16-bit number, and would be lost.
    """

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if buffer.is_floating_point() and buffer.element_size() > after.element_size() and after.element_size() < 4:
                setattr(self, name, buffer.float().to(after.device))
        keep_dtypes(self, {name: buffer for name, buffer in before.items() if not buffer.is_floating_point()})
        return self
