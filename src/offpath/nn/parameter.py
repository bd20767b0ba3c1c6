"""A parameter that changes its size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def replace_values(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` another size and stay the same object, so that an optimizer that holds it goes on holding it."""
    parameter.grad = None
    # Autograd remembers the shape of a leaf's gradient until its data changes type: hence the detour.
    detour = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = data.new_empty(0, dtype=detour)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)  # a graph from before must not compute with the new numbers
