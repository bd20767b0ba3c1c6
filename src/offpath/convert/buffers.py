"""What a model remembers between calls, put back after somebody else has called it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards there are the same buffers as before, with the same contents; they are copied for as long as it lasts.

    Those of modules that have not seen an input yet, and tensors of inference mode, are left alone.
    """
    kept = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
        if not any(buffer is not None and is_lazy(buffer) for buffer in module._buffers.values())
    ]
    distinct = {id(buffer): buffer for _, buffers, _ in kept for buffer in buffers.values() if buffer is not None}
    copies = [
        (buffer, buffer._version, buffer.clone())
        for buffer in distinct.values()
        if not buffer.is_inference() and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, buffers, not_saved in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = not_saved
        with torch.no_grad():
            for buffer, version, copy in copies:
                # The contents tell: torch's batch norm, and writes through `.data`, count no version. Sparse tensors
                # cannot be compared.
                comparable = buffer.layout is torch.strided
                if not torch.equal(buffer, copy) if comparable else buffer._version != version:
                    buffer.copy_(copy)
