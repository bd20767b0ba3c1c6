"""What other rooms may know of the hooks by which a topology watches layers."""

from __future__ import annotations

from torch import nn


class Watch:
    """A hook of a topology: nobody misses it on a layer that takes another one's place, and copies bring idle ones."""


def hooks_of_others(module: nn.Module) -> list[object]:
    """The hooks on a module and its parameters, but for a topology's own."""
    hooks = [
        hook
        for name, registered in vars(module).items()
        if "_hooks" in name and isinstance(registered, dict)
        for hook in registered.values()
        if callable(hook)  # and not what torch remembers of one
    ]
    for parameter in module._parameters.values():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks += (getattr(parameter, kind, None) or {}).values()
    return [hook for hook in hooks if not isinstance(getattr(hook, "__self__", hook), Watch)]
