"""Calling a model that somebody compiled as it was before: compiled code calls no hooks that came after it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from offpath.nn.compiled import is_compiled


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """No compiled code runs inside, if there is any in `model`."""
    if any(module._compiled_call_impl is not None or is_compiled(module) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
