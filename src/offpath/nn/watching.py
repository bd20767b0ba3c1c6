"""What other rooms may know of the hooks by which a topology watches layers."""

from __future__ import annotations

from torch import nn


class Watch:
    """A hook of a topology; copies of a layer bring an idle one along, which nobody misses."""

    def watches(self, module: nn.Module) -> bool:
        """Whether it works on this module, and not on the one that was copied."""
        raise NotImplementedError


def hooks_of_others(module: nn.Module) -> list[object]:
    """The hooks on a module and its parameters, but for a topology's own."""
    return [hook for hook in _hooks(module) if not isinstance(hook, Watch)]


def is_watched(module: nn.Module) -> bool:
    """Whether a topology watches this module, in the steps before an update."""
    return any(isinstance(hook, Watch) and hook.watches(module) for hook in _hooks(module))


def _hooks(module: nn.Module) -> list[object]:
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
    return [getattr(hook, "__self__", hook) for hook in hooks]
