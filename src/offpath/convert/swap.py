"""Replacing modules inside a model, at every place where they stand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever its original is a child; a module used in two places stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
