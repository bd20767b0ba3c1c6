"""The look at a layer's topology digest that a compiled call gets."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from offpath.nn.sparse_weight import SparseWeightModule


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
