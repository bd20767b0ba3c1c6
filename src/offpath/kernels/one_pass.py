"""What several products of one backward pass need alike, made once: so one of them sorts the entries for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
# What was made last, under what holds in one pass. The tensor that it was made of stays with it, so that no other one
# gets its memory.
_last: dict[tuple[object, ...], tuple[Tensor, Any]] = {}


class _Thread(threading.local):
    alone = False


_thread = _Thread()


def once_in_a_pass(make: Callable[[Tensor, int], Made], of: Tensor, size: int) -> Made:
    """`make(of, size)`, or what that has given in the same backward pass, if `of` has not been written into since.

    One result is kept, until the next one or the end of the pass. Outside of a pass, and where the caller is `alone`,
    it is made anew.
    """
    backward_pass = torch._C._current_graph_task_id()  # -1 outside of any
    if backward_pass < 0 or _thread.alone or of.is_inference():
        return make(of, size)
    stream = torch._C._cuda_getCurrentRawStream(of.get_device()) if of.is_cuda else 0
    # A write in place raises the version, through whatever view; a graph that is replayed between two passes does not.
    memory = of.data_ptr(), of.shape, of.stride(), of.dtype, of._version
    key = make, backward_pass, stream, *memory, size
    found = _last.get(key)
    if found is None:
        found = of, make(of, size)
        _last.clear()
        _last[key] = found
        torch.autograd.Variable._execution_engine.queue_callback(_last.clear)
    made: Made = found[1]
    return made


@contextmanager
def alone() -> Iterator[None]:
    """Products in this block keep nothing for others: who compiles them into a graph has to know of all that lives."""
    before, _thread.alone = _thread.alone, True
    try:
        yield
    finally:
        _thread.alone = before
