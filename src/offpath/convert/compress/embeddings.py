"""Embeddings with rows of int8, for those who ask for them."""

from __future__ import annotations

from torch import nn

from offpath.convert.swap import obstacles
from offpath.nn import Int8Embedding
from offpath.nn.filters import FilterFn


def int8_embeddings(
    model: nn.Module, filter_fn: FilterFn | None
) -> tuple[dict[str, tuple[nn.Embedding, Int8Embedding]], list[tuple[str, str]]]:
    """The embeddings of `model` by name, each with what may take its place; and (name, reason) of those that stay."""
    found: dict[str, tuple[nn.Embedding, Int8Embedding]] = {}
    skipped: list[tuple[str, str]] = []
    blocked = obstacles(model, nn.Embedding, "weight")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if module in blocked:
            skipped.append((name, blocked[module]))
            continue
        try:
            found[name] = module, Int8Embedding.from_dense(module)
        except ValueError as error:
            skipped.append((name, str(error)))
    return found, skipped
