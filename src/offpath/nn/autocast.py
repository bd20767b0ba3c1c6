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
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # meta has none
        return x, values, bias
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), _cast(values, dtype), None if bias is None else _cast(bias, dtype)


def _cast(operand: Tensor, dtype: torch.dtype) -> Tensor:
    return operand if operand.dtype is torch.float64 else operand.to(dtype)
