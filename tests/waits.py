"""Catches whoever waits for the device: no GPU is needed to see what would stop the host there.

What a kernel of a GPU computes is not there yet when Python goes on. Every op that has to know a number of it - how
many entries are live, whether any is - stops until all that was launched has been computed, and cannot be captured in a
CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Ops whose result, or its size, the host has to know; and copies of what the host made.
WAITING = {
    _ATEN._local_scalar_dense,
    _ATEN.item,
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.nonzero,
    _ATEN.argwhere,
    _ATEN.masked_select,
    _ATEN.bincount,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN._unique,
    _ATEN._unique2,
    _ATEN.lift_fresh,
}
_PUTS = (_ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)
_BOOLEANS = (torch.bool, torch.uint8)


class Waited(AssertionError):
    """An op would have waited for the device."""


class Waits(TorchDispatchMode):
    """Lists what would wait for a GPU, whatever device its operands are on; raises `Waited` for more than `most`."""

    def __init__(self, most: int = 0) -> None:
        super().__init__()
        self.most = most
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if why := _waits(func, args, kwargs or {}):
            self.found.append(why)
            if len(self.found) > self.most:
                raise Waited(", ".join(self.found))
        if func.namespace == "offpath":  # its kernel calls ops of torch, which would not come by here otherwise
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Counts(TorchDispatchMode):
    """Counts the calls of some ops of torch by name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.found = dict.fromkeys(names, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.found:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple, kwargs: dict) -> str | None:
    op = func.overloadpacket
    if op in WAITING or (op is _ATEN.repeat_interleave and kwargs.get("output_size") is None):
        return str(func)
    if op in (_ATEN.index, *_PUTS):
        if any(isinstance(one, Tensor) and one.dtype in _BOOLEANS for one in args[1]):
            return f"{func} by booleans"
        if op in _PUTS and (kwargs.get("accumulate") or (len(args) > 3 and args[3])):
            return f"{func} that adds, and looked at its indices up to torch 2.8 or so"
    return None
