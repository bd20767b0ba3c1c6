"""What the checks in many processes share: where this one stands, what the others say, and a step of training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel as Wrapped

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[..., None], *arguments: object) -> None:
    name = " ".join([function.__name__.strip("_"), *map(str, arguments)])
    CHECKS[name] = lambda: function(*arguments)


def my_rank() -> int:
    return distributed.get_rank()


def count() -> int:
    return distributed.get_world_size()


def gathered(value: Any) -> list[Any]:
    values = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def same_everywhere(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Values, indices and the optimizer's state are equal bit for bit."""
    mine = json.dumps([bits(model.state_dict()), bits(optimizer.state_dict())])
    assert len(set(gathered(mine))) == 1


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy().tobytes().hex()
    if isinstance(value, dict):
        return {str(key): bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, list | tuple) else value


@contextmanager
def refused_everywhere(message: str, alike: bool = True) -> Iterator[None]:
    """Every process raises, with a message that matches; where they are not `alike`, that of its own."""
    said = "nothing"
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    everywhere = gathered(said) if alike else [said]
    assert all(re.search(message, text) for text in everywhere), everywhere


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, accumulate: int = 1) -> None:
    """A training step on tokens that no other process sees."""
    optimizer.zero_grad()
    for turn in range(accumulate):
        generator = torch.Generator().manual_seed(100 * step + 10 * turn + my_rank())
        last = turn == accumulate - 1
        with nullcontext() if last or not isinstance(model, Wrapped) else model.no_sync():
            model(torch.randn(5, 12, generator=generator)).square().mean().backward()
    optimizer.step()
