"""The one `torch.library.Library` of the package, and how an op joins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"offpath::{name}", fake, lib=library)
    if autograd is not None:
        save, backward = autograd
        torch.library.register_autograd(f"offpath::{name}", backward, setup_context=save, lib=library)
