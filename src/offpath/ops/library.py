"""The one `torch.library.Library` of the package, and how an op joins it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

library = torch.library.Library("offpath", "DEF")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> None:
    """Add `offpath::<schema>`: what computes it, what its result looks like, and (what to save, the gradient)."""
    library.define(schema)
    name = schema[: schema.index("(")]
    library.impl(name, _without_forward_mode(name, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"offpath::{name}", fake, lib=library)
    if autograd is not None:
        save, backward = autograd
        torch.library.register_autograd(f"offpath::{name}", backward, setup_context=save, lib=library)


def _without_forward_mode(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.library` lets tangents pass by and calls their result zero; a refusal instead."""

    @wraps(kernel)
    def run(*operands: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"expected no forward-mode differentiation, which offpath::{name} does not have, got a call inside of "
                "it; use reverse mode: torch.autograd.grad, torch.func.grad, torch.func.vjp"
            )
        return kernel(*operands)

    return run
