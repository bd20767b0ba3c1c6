"""Watching what goes into and comes back out of a layer, in the steps that need it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from offpath.nn import SparseLinear
from offpath.nn.watching import Watch


class Pass(NamedTuple):
    """What went into a layer, the gradient of what came out, and what the pass counts beside those of other steps."""

    x: Tensor
    dy: Tensor
    weight: float = 1.0


class Capture:
    """Keeps x and dy of every pass through one layer while it is armed, if its backward adds to `values.grad`.

    The tensors are those that autograd holds anyway, so that they cost memory only for as long as they are kept: from
    the backward pass to `topology.step()`. Copies are what callers may write over: inputs that no op has made (batches,
    parameters), and those of earlier steps, the `history`.
    """

    def __init__(self, layer: SparseLinear) -> None:
        self._layer = layer
        self._hook = _Hook(layer)
        self.history: tuple[Pass, ...] = ()
        # The layer holds the hook: without its topology, it would go on and keep the passes of every step.
        weakref.finalize(self, self._hook.unwatch).atexit = False

    def arm(self) -> None:
        """Watch from now on."""
        self._hook.watch(self._layer)

    def disarm(self) -> None:
        """Watch no more, and forget."""
        self.history = ()
        self._hook.unwatch()

    def clear(self) -> None:
        """Forget the passes since the last step; passes whose backward is still to come are forgotten as well."""
        self._hook.clear()

    def age(self, decay: float) -> None:
        """The passes since the last step become history, and all of it counts `decay` times what it did."""
        new = (Pass(x.clone(), dy.clone(), weight) for x, dy, weight in self._hook.passes)
        self.history = tuple(Pass(x, dy, weight * decay) for x, dy, weight in (*self.history, *new))
        self.clear()

    def load(self, history: Iterable[tuple[Tensor, Tensor, float]]) -> None:
        """Go on from copies of a `history`."""
        device = self._layer.values.device
        self.history = tuple(Pass(x.to(device, copy=True), dy.to(device, copy=True), w) for x, dy, w in history)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Every pass since the last step, in the order of the backward passes."""
        return tuple(self._hook.passes)

    @property
    def written_over(self) -> bool:
        """Whether a tensor of `passes` is no longer what it was; torch does not count writes through NumPy."""
        return any(_versions(*seen) != versions for seen, versions in self._hook.confirmed)


class _Hook(Watch):
    """A forward hook that works on its own layer alone: copies and pickles of a model bring an idle one along.

    What it sees is pending until the gradient of `values` has been accumulated in the same call of the engine:
    `torch.autograd.grad` for the gradient of something else leaves it behind, and there it stays until `clear`. What
    has been accumulated counts until `values.grad` is None again: then somebody has thrown it away.
    """

    def __init__(self, layer: SparseLinear | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else None
        self._of_layer: RemovableHandle | None = None
        self._of_values: RemovableHandle | None = None
        self._values: Tensor | None = None  # the parameter itself; a call may be given others
        self.clear()

    def watches(self, module: nn.Module) -> bool:
        return self._layer is not None and self._layer() is module

    def clear(self) -> None:
        self._pending: list[tuple[int, Pass, tuple[int, int]]] = []
        self.confirmed: list[tuple[Pass, tuple[int, int]]] = []

    @property
    def passes(self) -> list[Pass]:
        return [seen for seen, _ in self.confirmed]

    def watch(self, layer: SparseLinear) -> None:
        if self._of_layer is None:
            # Before hooks of others, who may return something else than the layer did.
            self._of_layer = layer.register_forward_hook(self, with_kwargs=True, prepend=True)
            self._follow(layer.values)

    def unwatch(self) -> None:
        for handle in (self._of_layer, self._of_values):
            if handle is not None:
                handle.remove()
        self._of_layer = self._of_values = self._values = None
        self.clear()

    def _follow(self, values: Tensor) -> None:
        """Hear of gradients that are added to those of `values`, which may have been frozen until now."""
        if self._of_values is None and values.is_leaf and values.requires_grad:
            self._of_values = values.register_post_accumulate_grad_hook(self._confirm)
            self._values = values
        elif values is self._values:
            # torch.utils.swap_tensors, with which modules may load and cast, takes hooks along and never calls them.
            values._post_accumulate_grad_hooks = values._post_accumulate_grad_hooks

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        own = self._layer() if self._layer is not None else None
        if own is None or own is not layer or not y.requires_grad or not own.values.requires_grad:
            return
        self._follow(own.values)
        pending, confirmed, values = self._pending, self.confirmed, self._values
        given = args[0] if args else kwargs["x"]
        may_be_written = (given if given._base is None else given._base).is_leaf

        def keep(seen: Pass) -> None:
            if values is not None and values.grad is None:
                confirmed.clear()
            pending.append((torch._C._current_graph_task_id(), seen, _versions(*seen)))

        assert y.grad_fn is not None
        _follow_product(y.grad_fn, y.output_nr, given.detach(), may_be_written, keep)

    def _confirm(self, values: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        self.confirmed += [(seen, versions) for of_task, seen, versions in self._pending if of_task == task]
        self._pending[:] = [entry for entry in self._pending if entry[0] != task]

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _follow_product(node: Node, place: int, x: Tensor, may_be_written: bool, keep: Callable[[Pass], None]) -> None:
    """Keep x and dy when the gradient dy of x @ W.T comes, and so of all products with W that autograd makes of it.

    `node` is the product's. At it, and not at the tensor, a gradient is what the hooks of others have made of it.
    """

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        dy = gradients[place]
        if dy is not None:
            keep(Pass(x.clone() if may_be_written else x, _detached(dy)))

    def after(of_operands: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
        dx, dy = of_operands[0], gradients[place]
        if dx is not None and dy is not None and dx.requires_grad:  # create_graph=True
            _follow_gradient(dx, _detached(dy), keep)

    node.register_prehook(before)
    node.register_hook(after)


def _follow_gradient(dx: Tensor, dy: Tensor, keep: Callable[[Pass], None]) -> None:
    """The same of dx = dy @ W, which gives W the gradient dy.T @ ddx: that of a product of ddx."""
    node, place = dx.grad_fn, dx.output_nr
    assert node is not None

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        ddx = gradients[place]
        if ddx is not None:
            keep(Pass(_detached(ddx), dy))

    def after(of_operands: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
        of_dy, ddx = of_operands[0], gradients[place]
        if of_dy is None or ddx is None or not of_dy.requires_grad:
            return
        product = of_dy.grad_fn  # ddx @ W.T, or a sum that begins with it
        while product is not None and product.name() == "AddBackward0":
            product = product.next_functions[0][0]
        assert product is not None
        _follow_product(product, 0, _detached(ddx), False, keep)

    node.register_prehook(before)
    node.register_hook(after)


def _detached(gradient: Tensor) -> Tensor:
    """The tensor itself and not an alias: autograd would make an alias's tensor the .grad of somebody else."""
    return gradient.detach() if gradient.requires_grad else gradient


def _versions(x: Tensor, dy: Tensor, weight: float) -> tuple[int, int]:
    """What torch counts up with every write into one of them; detached tensors share the count."""
    return x._version, dy._version
