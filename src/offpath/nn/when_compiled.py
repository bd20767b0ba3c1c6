"""What `torch.compile` puts around a model, and the look at a layer's topology digest that a compiled call gets."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from offpath.nn.sparse_weight import SparseWeightModule


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` returned for another module."""
    return type(module).__name__ == "OptimizedModule"  # its class is in the compiler: seconds of an import


def inside_compiled(model: nn.Module) -> nn.Module:
    """The model that was given to `torch.compile`, in which layers have the names that its owner gave them."""
    return model._orig_mod if is_compiled(model) else model  # type: ignore[return-value]  # a module


def check_when_compiled(layer: SparseWeightModule) -> None:
    """What every call of an eager layer looks at, looked at once: when the call is compiled."""
    if torch.compiler.is_dynamo_compiling():
        _looked_at(layer)


def _looked_at(layer: SparseWeightModule) -> bool:
    if not isinstance(layer.topology_digest, FakeTensor):
        layer._check_digest()
    return True


# All that torch.compiler.assume_constant_result does, which brings the compiler with it: seconds of an import.
_looked_at._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare no attributes
