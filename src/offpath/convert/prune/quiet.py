"""Running somebody's model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from offpath.convert.buffers import buffers_restored
from offpath.convert.uncompiled import uncompiled


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no compiled code inside; modes, buffers and random numbers restored after it.

    Buffers are copied for as long as it lasts. Modules that do something in `train()` or `eval()` are not called: the
    mode is set and put back in each module by itself.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(cuda)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(buffers_restored(model))
        stack.enter_context(uncompiled(model))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
