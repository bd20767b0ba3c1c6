"""A model on an example input: what its layers get to see, how long it takes, and what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offpath.convert.compress.verify import Bound
from offpath.convert.fused_encoders import called_by_encoders
from offpath.convert.uncompiled import uncompiled


@dataclass(frozen=True)
class Input:
    """What a layer is called with. A convolution takes another time for images that are `channels_last`.

    `autocast` is the dtype that the model has asked for around the call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, x: Tensor) -> Input:
        """The like of `x`."""
        layout = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return cls(tuple(x.shape), x.dtype, layout, autocast)

    def surroundings(self) -> AbstractContextManager[object]:
        """Inside, a layer computes as it did in the model."""
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def random(self) -> Tensor:
        """Standard normal numbers, the same for the same shape; leaves torch's global generator alone."""
        x = torch.randn(*self.shape, device="cpu", generator=torch.Generator().manual_seed(0)).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


class Example:
    """`model` called with `example`: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Raises `TypeError` for anything else.
    """

    def __init__(self, model: nn.Module, example: object) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        if isinstance(example, Tensor):
            self.args = (example,)
        elif isinstance(example, tuple):
            self.args = example
        elif isinstance(example, Mapping):
            self.kwargs = dict(example)
        else:
            raise TypeError(
                "expected example to be a tensor, a tuple of positional arguments or a mapping of keyword arguments, "
                f"got {type(example).__name__}"
            )
        self.model = model

    @torch.no_grad()
    def run(self) -> Any:
        """What the model returns in evaluation mode, so that it neither drops anything out nor keeps statistics.

        Random numbers that it draws all the same are those of each run, and the global generator stays as it was.
        """
        with evaluating(self.model), torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            return self.call()

    def call(self) -> Any:
        """What the model returns in whatever mode it is."""
        return self.model(*self.args, **self.kwargs)

    def outputs(self, called: Collection[nn.Module] = ()) -> list[Tensor]:
        """The floating-point tensors that the model returns; torch's encoders call these layers of theirs.

        Fused, an encoder returns zeros where there is padding, and else what comes of it.
        """
        with called_by_encoders(self.model, called):
            return [t for t in _tensors(self.run()) if t.is_floating_point()]

    @torch.no_grad()
    def seconds(self) -> float:
        """Time of a call that follows another one."""
        with evaluating(self.model):
            self.call()
            start = time.perf_counter()
            self.call()
            return time.perf_counter() - start

    def inputs(self, modules: Collection[nn.Module]) -> dict[nn.Module, list[Input]]:
        """The input of each call of each module; without those that are not called."""
        seen: dict[nn.Module, list[Input]] = {}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            seen.setdefault(module, []).append(Input.of(x))

        hooks = _hooks(m.register_forward_pre_hook(look, with_kwargs=True) for m in modules)
        with called_by_encoders(self.model, modules), hooks:
            self.run()
        return seen

    def outputs_off_by_the_bound(self, bounds: Mapping[nn.Module, Bound]) -> list[Tensor]:
        """What the model returns when each output of these layers is moved by its bound, up or down at random."""
        generator = torch.Generator().manual_seed(0)

        def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            bound = bounds[module](_input(args, kwargs))
            signs = torch.randint(0, 2, bound.shape, generator=generator, device="cpu") * 2 - 1
            return output + (signs * bound).to(output.dtype)

        with _hooks(m.register_forward_hook(move, with_kwargs=True) for m in bounds):
            return self.outputs(called=bounds)


def differences(outputs: list[Tensor], others: list[Tensor]) -> list[float]:
    """||a - b|| / ||a|| of each, infinite where only one of both is finite, and where any shapes differ."""
    if [t.shape for t in outputs] != [t.shape for t in others]:
        return [math.inf] * len(outputs)
    found = []
    for a, b in zip(outputs, others, strict=True):
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            found.append(math.inf)
            continue
        norm = float(a[finite].double().norm())
        difference = float((a[finite].double() - b[finite].double()).norm())
        found.append(difference / norm if norm else math.inf if difference else 0.0)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no compiled code inside the block, and afterwards each module in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with uncompiled(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    registered: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for handle in handles:
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
