"""What `torch.compile(model)` returns, told apart without the compiler, whose import takes seconds."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` returned for another module."""
    return type(module).__name__ == "OptimizedModule"


def inside_compiled(model: nn.Module) -> nn.Module:
    """The model that was given to `torch.compile`, in which layers have the names that its owner gave them."""
    return model.get_submodule("_orig_mod") if is_compiled(model) else model
