"""An op as the kind of `autograd.Function` that `torch.func` can transform, in reverse and in forward mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# From all operands, all results and the tangents of the operands to those of the results; see `ops.tangents`.
Rule = Callable[[Sequence[Any], Sequence[Tensor], Sequence[Tensor | None]], Any]

functorch_interpreter = torch._C._functorch.peek_interpreter_stack
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


class _Passage(threading.local):
    """Whether an op is called by a `Function` that takes care of its tangents, which the op itself would drop."""

    is_open = False


passage = _Passage()


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is under way."""
    return functorch_interpreter() is not None


def is_in_forward_mode() -> bool:
    """Whether tangents may come along, which only an `autograd.Function` passes on."""
    return forward_ad._current_level >= 0


def is_differentiating() -> bool:
    """Whether derivatives may be under way that neither `requires_grad` nor `torch.is_grad_enabled` tell of."""
    return not torch.compiler.is_compiling() and (is_transforming() or is_in_forward_mode())


def untransformed(function: Any) -> Callable[..., Any]:
    """`function.apply` where no transform is under way, nor a compiler.

    `Function.apply` asks in Python, for as long as a tiny layer takes, what only transforms need to know. What it does
    besides is done here: a tensor that has outlived its transform gives up its wrapper.
    """
    apply = super(Function, function).apply

    def run(*operands: Any) -> Any:
        return apply(*[_unwrap_if_dead(one) if isinstance(one, Tensor) else one for one in operands])

    return run


def transformed(name: str, save: Callable[..., None], backward: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """`offpath::<name>` as the kind of `autograd.Function` that `torch.func` can transform, both modes of it.

    All operands and results are saved: `torch.func.vmap` takes what is saved for the two modes for one list.
    """

    def forward(*operands):
        was_open, passage.is_open = passage.is_open, True
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.offpath, name).default(*operands)
        finally:
            passage.is_open = was_open

    def setup_context(ctx, inputs, output):
        save(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.operands = [None if isinstance(one, Tensor) else one for one in inputs]
        tensors = [one if isinstance(one, Tensor) else None for one in (*inputs, *outputs)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        if sum(one.is_floating_point() for one in outputs) == 1:  # the rules of several count on all gradients
            ctx.set_materialize_grads(False)  # an operand without a tangent has none, instead of one of zeros

    def gradients(ctx, *of_outputs):
        operands, outputs = _divided(ctx, _alive(ctx.saved_tensors))
        if all(one is None for one in of_outputs):
            return (None,) * len(operands)
        context = _Context(ctx.needs_input_grad)
        save(context, operands, outputs if len(outputs) > 1 else outputs[0])
        return backward(context, *of_outputs)

    def jvp(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):  # torch turns off what an outer forward mode needs
            operands, outputs = _divided(ctx, _primals(ctx.saved_tensors))
            found = rule(operands, outputs, tangents)
            if not isinstance(found, tuple):
                return found
            # torch takes no results of which some have a tangent and others have none.
            return tuple(_zeros(one) if of_one is None else of_one for one, of_one in zip(outputs, found, strict=True))

    methods = {"forward": forward, "setup_context": setup_context, "backward": gradients, "jvp": jvp}
    attributes = {key: staticmethod(method) for key, method in methods.items()} | {"generate_vmap_rule": True}
    function: Any = type(name, (Function,), attributes)
    return lambda *operands: function.apply(*map(_in_one, operands))


def in_both_modes(rules: Any) -> Callable[..., Any]:
    """A function of `rules`: `compute(*operands)`, `saved(ctx, *operands)`, `backward`, `jvp_rule(ctx, saved, ...)`.

    Two in one: torch looks at the signature of what transforms can take whenever it is called, which takes as long as a
    small layer, and Dynamo takes none with a `jvp`.
    """

    def forward(ctx, *operands):
        ctx.save_for_backward(*rules.saved(ctx, *operands))
        return rules.compute(*operands)

    def setup_context(ctx, inputs, output):
        tensors = rules.saved(ctx, *inputs)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def jvp(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            return rules.jvp_rule(ctx, _primals(ctx.saved_tensors), *tangents)

    name, backward = rules.__name__, staticmethod(rules.backward)
    usual: Any = type(name, (Function,), {"forward": staticmethod(forward), "backward": backward})
    methods = {"forward": rules.compute, "setup_context": setup_context, "jvp": jvp}
    attributes = {key: staticmethod(method) for key, method in methods.items()}
    transformable: Any = type(name, (Function,), attributes | {"backward": backward, "generate_vmap_rule": True})

    def apply(*operands: Any) -> Any:
        return transformable.apply(*operands) if is_differentiating() else usual.apply(*operands)

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


def _divided(ctx: Any, saved: Sequence[Any]) -> tuple[list[Any], Sequence[Tensor]]:
    """(operands, outputs)."""
    operands = [other if there is None else there for there, other in zip(saved, ctx.operands, strict=False)]
    return operands, saved[len(ctx.operands) :]


def _alive(saved: Sequence[Any]) -> list[Any]:
    """Without the wrappers of a transform that is over: `torch.func.vjp` gives its gradients afterwards."""
    return [None if one is None else _unwrap_if_dead(one) for one in saved]


def _primals(saved: Sequence[Any]) -> list[Any]:
    """Without the tangents of this level: theirs is what the rule computes, and the outer ones are in what is left."""
    return [None if one is None else _primal(one) for one in saved]


def _primal(tensor: Tensor) -> Tensor:
    if not torch._C._functorch.is_batchedtensor(tensor):
        return forward_ad.unpack_dual(tensor).primal
    # `torch.func.vmap` has no rule for this one, so it is done below.
    dim, level = torch._C._functorch.maybe_get_bdim(tensor), torch._C._functorch.maybe_get_level(tensor)
    return torch._C._functorch._add_batch_dim(_primal(torch._C._functorch.get_unwrapped(tensor)), dim, level)


def _zeros(output: Tensor) -> Tensor | None:
    return torch.zeros_like(output) if output.is_floating_point() else None
