"""`torch.autocast` for a sparse layer."""

from __future__ import annotations

import torch
from torch import Tensor


def under_autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as `nn.Linear` would multiply them: in autocast's dtype where it is enabled, float64 as it is.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     x, values, _ = under_autocast(torch.ones(2), torch.ones(3), None)
    >>> x.dtype, values.dtype
    (torch.bfloat16, torch.bfloat16)
    """
    dtype = _dtype(x)
    if dtype is None:
        return x, values, bias
    return _cast(x, dtype), _cast(values, dtype), None if bias is None else _cast(bias, dtype)


def input_under_autocast(x: Tensor) -> Tensor:
    """The input of a layer whose weight has no floating dtype."""
    dtype = _dtype(x)
    return x if dtype is None else _cast(x, dtype)


def _dtype(x: Tensor) -> torch.dtype | None:
    # Every call of a layer comes here: the first question is the quickest. Meta has no autocast to ask about.
    enabled = torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if enabled else None


def _cast(operand: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch casts: what is neither a real number nor shorter than float64 stays, and is refused by name.
    return operand.to(dtype) if operand.is_floating_point() and operand.dtype is not torch.float64 else operand
