"""The one `torch.library.Library` of the package, how an op joins it, and when the way through it can be spared."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler as autograd_profiler
from torch.nn import Parameter

from offpath.kernels import KernelError
from offpath.kernels.one_pass import alone
from offpath.kernels.operands import wide as wide
from offpath.ops import batching
from offpath.ops.transformable import (
    Rule,
    functorch_interpreter,
    is_differentiating as is_differentiating,
    is_in_forward_mode,
    is_transforming as is_transforming,
    passage,
    transformed,
    untransformed,
)

library = torch.library.Library("offpath", "DEF")
# The ops of `define` by name, without the way through the dispatcher where nobody listens. In eager training that way
# takes as long as several small kernels, in forward and in backward.
direct = SimpleNamespace()
NO_FORWARD_MODE = (
    "expected no forward-mode differentiation of {}, got a call inside of it; functions of offpath.ops have it where "
    "the op has a gradient, or use reverse mode: backward(), torch.autograd.grad or torch.func.jacrev"
)
_PLAIN = (Tensor, Parameter)
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_count_of_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_is_included, _VMAP = torch._C._dispatch_tls_is_dispatch_key_included, torch._C._dispatch_key_parse("VmapMode")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    tangent: Rule | None = None,
) -> None:
    """Add `offpath::<schema>`: what computes it, what its result looks like, (what to save, the gradient), the tangent.

    Also to `direct`, if it writes into no operand.
    """
    library.define(schema)
    name = schema[: schema.index("(")]
    library.impl(name, _on_its_own(name, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"offpath::{name}", of_one_device(name, _followed(name, fake)), lib=library)
    batch(name)
    if autograd is not None:
        save, backward = autograd
        torch.library.register_autograd(f"offpath::{name}", backward, setup_context=save, lib=library)
    if "!" not in schema:
        setattr(direct, name, _directly(name, kernel, autograd, tangent))


def batch(name: str, folds: bool = False) -> None:
    """Let `torch.func.vmap` transform `offpath::<name>`; see `batching.rule`."""
    op = getattr(torch.ops.offpath, name).default
    torch.library.register_vmap(f"offpath::{name}", batching.rule(op, folds), lib=library)


def _directly(
    name: str,
    kernel: Callable[..., Any],
    autograd: tuple[Callable[..., None], Callable[..., Any]] | None,
    tangent: Rule | None,
) -> Callable[..., Any]:
    op = getattr(torch.ops.offpath, name).default
    differentiable = None if autograd is None else untransformed(_function(name, kernel, *autograd))
    transformable = op if autograd is None or tangent is None else transformed(name, *autograd, tangent)
    are_tensors = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
    tensors = sum(are_tensors)
    assert all(are_tensors[:tensors]), f"expected the tensors of {name} before all else"

    def call(*operands: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*operands)
        if not nobody_listens(*operands[:tensors]):
            return transformable(*operands) if is_transforming() or is_in_forward_mode() else op(*operands)
        if torch.is_grad_enabled():
            for operand in operands[:tensors]:
                if operand is not None and operand.requires_grad:
                    return op(*operands) if differentiable is None else differentiable(*operands)
        return kernel(*operands)

    return call


def _function(
    name: str, kernel: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> type[Function]:
    def forward(ctx, *operands):
        output = no_views(kernel(*operands))
        save(ctx, operands, output)
        return output

    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def unwrapped(tensor: Tensor) -> Tensor:
    """What transforms of `torch.func` have wrapped, with a dimension for each batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_vmapped(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` has given it a dimension that it does not show, below other transforms or not."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def no_views(output: Any) -> Any:
    """What a kernel returned, without a base: autograd would refuse `nn.ReLU(inplace=True)` behind a `Function`.

    For memory that nobody else is going to see: a view without a base shares no version with it.
    """
    if isinstance(output, tuple):
        return tuple(map(no_views, output))
    if output is None or not output._is_view():
        return output
    with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
        return output.view_as(output)


def of_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` for operands on one device: one that is on meta would make torch take the result of `fake` for real."""

    @wraps(fake)
    def run(*operands: Any, **options: Any) -> Any:
        devices = {operand.device for operand in operands if isinstance(operand, Tensor)}
        if len(devices) > 1:
            raise KernelError(
                f"expected all operands of offpath::{name} on one device, got {', '.join(sorted(map(str, devices)))}; "
                "move the module or its input, and give a module on meta its weights first (to_empty, load_state_dict)"
            )
        return fake(*operands, **options)

    return run


def _on_its_own(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*operands: Any) -> Any:
        _refuse_tangents(name)
        with alone():
            return no_views(kernel(*operands))

    return run


def _followed(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which is what the compiler calls of an op inside of a forward mode that it traces."""

    @wraps(fake)
    def run(*operands: Any, **options: Any) -> Any:
        _refuse_tangents(name)
        return fake(*operands, **options)

    return run


def _refuse_tangents(name: str) -> None:
    """`torch.library` lets tangents pass by and calls their result zero, unless a `Function` takes care of them."""
    if is_in_forward_mode() and not passage.is_open:
        raise NotImplementedError(NO_FORWARD_MODE.format(f"offpath::{name}"))


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., features] as [tokens, features]."""
    # Not reshape(-1, ...): the leading size cannot be inferred for a tensor without entries. Nor numel(), which makes a
    # number of a size that a compiler keeps open.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def is_tracing() -> bool:
    """Whether torch.jit.trace writes down which ops are called."""
    return _tracing_state() is not None


def saved_tensor_hooks() -> bool:
    """Whether somebody has a say in what autograd saves: activation checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_in_a_mode() -> bool:
    """Whether a mode stands between torch's calls and their kernels, as fake tensors and counters of operations do."""
    return _count_of_modes() > 0


def is_faking() -> bool:
    """Whether results have shapes and no numbers: inside of a `FakeTensorMode`, real operands too."""
    return _count_of_modes() > 0 and torch._C._get_dispatch_mode(_FAKE) is not None


def nobody_listens(*operands: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but call the kernel; the trip through it costs as much as a small layer.

    The meta device, negative views, modes, functorch, batched gradients, tracers, forward-mode differentiation,
    profilers and subclasses of tensors want more. Raises `KernelError` for a DTensor.
    """
    if (
        _count_of_modes() > 0
        or functorch_interpreter() is not None
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or autograd_profiler._is_profiler_enabled
        # Batched gradients go through a vmap older than functorch, in backward alone.
        or (not torch.is_grad_enabled() and _is_included(_VMAP))
    ):
        return False
    for operand in operands:  # a generator expression would take as long as all the rest
        if operand is not None and (type(operand) not in _PLAIN or operand.is_meta or operand.is_neg()):
            _refuse_distributed(operand)
            return False
    return True


def _refuse_distributed(operand: Tensor) -> None:
    """torch would ask for connections that are DTensors as well, which nobody can give."""
    if hasattr(operand, "full_tensor"):
        raise KernelError(
            f"expected plain tensors, got a DTensor of shape {tuple(operand.shape)}: sparse layers are not split by "
            "tensor parallelism. Give them all features in a plain tensor, by x.full_tensor() or, in the plan of the "
            "layer before, output_layouts=Replicate() and use_local_output=True"
        )
