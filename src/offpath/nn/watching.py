"""What other rooms may know of the hooks by which a topology watches layers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class Watch(ABC):
    """A hook of a topology; copies of a layer bring an idle one along, which nobody misses."""

    @abstractmethod
    def watches(self, module: nn.Module) -> bool:
        """Whether it works on this module, and not on the one that was copied."""
