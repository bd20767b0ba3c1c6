"""An op as the kind of `autograd.Function` that `torch.func` can transform, in reverse and in forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# From all operands, all results and the tangents of the operands to those of the results; see `ops.tangents`.
Rule = Callable[[Sequence[Any], Sequence[Tensor], Sequence[Tensor | None]], Any]


def is_in_forward_mode() -> bool:
    """Whether tangents may come along, which only an `autograd.Function` passes on."""
    return forward_ad._current_level >= 0


def transformed(name: str, save: Callable[..., None], backward: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """`offpath::<name>` as the kind of `autograd.Function` that `torch.func` can transform, both modes of it."""

    def forward(*operands):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.offpath, name).default(*operands)

    def setup_context(ctx, inputs, output):
        save(ctx, inputs, output)
        if is_in_forward_mode():
            _save_for_both(ctx, inputs, output if isinstance(output, tuple) else (output,))

    def gradients(ctx, *of_outputs):
        if not hasattr(ctx, "operands"):
            return backward(ctx, *of_outputs)
        context, (operands, outputs) = _Context(ctx.needs_input_grad), _saved(ctx)
        save(context, operands, outputs if len(outputs) > 1 else outputs[0])
        return backward(context, *of_outputs)

    def jvp(ctx, *tangents):
        operands, outputs = _saved(ctx)
        found = rule(operands, outputs, tangents)
        if not isinstance(found, tuple):
            return found
        # torch takes no results of which some have a tangent and others have none.
        return tuple(_zeros(one) if of_one is None else of_one for one, of_one in zip(outputs, found, strict=True))

    methods = {"forward": forward, "setup_context": setup_context, "backward": gradients, "jvp": jvp}
    attributes = {key: staticmethod(method) for key, method in methods.items()} | {"generate_vmap_rule": True}
    function: Any = type(name, (Function,), attributes)
    return lambda *operands: function.apply(*map(_in_one, operands))


def in_both_modes(function: Any) -> Callable[..., Any]:
    """`function.apply`, of an `autograd.Function` whose `jvp` is called `jvp_rule`: Dynamo takes none with a `jvp`."""
    with_jvp: Any = type(function.__name__, (function,), {"jvp": staticmethod(function.jvp_rule)})

    def apply(*operands: Any) -> Any:
        tangents = not torch.compiler.is_compiling() and is_in_forward_mode()
        return with_jvp.apply(*operands) if tangents else function.apply(*operands)

    return apply


def _in_one(operand: Any) -> Any:
    return _Sizes(operand) if isinstance(operand, tuple | list) else operand


class _Sizes(tuple):
    """Numbers that `torch.func` takes for one operand: it counts those of a tuple when it looks for their tangents."""


class _Context(SimpleNamespace):
    """What a `save` writes into, long after the op was called."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        super().__init__(needs_input_grad=needs_input_grad)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _save_for_both(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """All of it: `torch.func.vmap` takes what is saved for the two modes for one list."""
    ctx.operands = [None if isinstance(one, Tensor) else one for one in inputs]
    tensors = [one if isinstance(one, Tensor) else None for one in (*inputs, *outputs)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    if sum(one.is_floating_point() for one in outputs) == 1:  # whose gradient is there, or nobody asks for others
        ctx.set_materialize_grads(False)  # an operand without a tangent has none, instead of one of zeros


def _saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    """(operands, outputs)."""
    tensors, others = ctx.saved_tensors, ctx.operands
    operands = [other if there is None else there for there, other in zip(tensors, others, strict=False)]
    return operands, tensors[len(others) :]


def _zeros(output: Tensor) -> Tensor | None:
    return torch.zeros_like(output) if output.is_floating_point() else None
