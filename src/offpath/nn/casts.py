"""Buffers that a cast of a whole module leaves alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def keep_dtypes(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give buffers of `module` back the dtypes that they had `before` it was cast, with the numbers of then.

    `module.bfloat16()` casts what is floating, `module.type(torch.bfloat16)` whole numbers as well.
    """
    for name, buffer in before.items():
        after = getattr(module, name)
        if after.dtype is not buffer.dtype:
            setattr(module, name, buffer.to(after.device))
