"""A layer as pruning sees it: its weight as matrices whose columns meet its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D: a linear layer whose weight is (in, out)."""
    return any(_is_conv1d(kind) for kind in type(module).__mro__)


def is_prunable(module: nn.Module) -> bool:
    """Whether `module` is of a kind that can be pruned."""
    return isinstance(module, KINDS) or is_transposed(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a prunable `module` may do something else with its input than to multiply it by its weight."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's takes inputs to another device
        return True
    for name in ("forward", "_conv_forward"):
        defined_by = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
        if defined_by is not None and defined_by not in KINDS and not _is_conv1d(defined_by):
            return True
    return False


def _is_conv1d(kind: type) -> bool:
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that is to be pruned, and where it first stands in the model.

    Its weight is seen as [groups, out / groups, in / groups * kernel size]: one matrix, except for convolutions with
    groups.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The parameter itself, without its history."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight.detach()

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for others."""
        return self.module.groups if isinstance(self.module, (nn.Conv1d, nn.Conv2d)) else 1

    def matrices(self) -> Tensor:
        """The weight as [groups, rows, columns]; shares its memory where its layout allows."""
        weight = self.weight.T if is_transposed(self.module) else self.weight.flatten(1)
        return weight.unflatten(0, (self.groups, -1))

    def zero(self, keep: Tensor) -> None:
        """Set the weights that are not in `keep` [groups, rows, columns] to zero; the others keep their bits."""
        self.weight.masked_fill_(self._as_weight(~keep), 0)

    def write(self, matrices: Tensor) -> None:
        """Replace all weights by those of `matrices` [groups, rows, columns], rounded to the weight's dtype."""
        self.weight.copy_(self._as_weight(matrices))

    def _as_weight(self, matrices: Tensor) -> Tensor:
        flat = matrices.flatten(0, 1)
        return flat.T if is_transposed(self.module) else flat.view(self.weight.shape)

    def nnz(self) -> int:
        """Weights that are not zero."""
        return int(torch.count_nonzero(self.weight))
