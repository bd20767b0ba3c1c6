"""Changing which connections a layer has, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.nn.linear import SparseLinear
from offpath.nn.parameter import replace_values
from offpath.ops import Connections
from offpath.pattern import Edit, PatternError


@torch.no_grad()
def rewire(layer: SparseLinear, edit: Edit, grown: Tensor | None = None) -> None:
    """Give `layer` the connections of `edit`, made from its own pattern by `offpath.pattern.edit`.

    Surviving values keep their bits, as do their entries of `values.grad`; grown connections begin with `grown` [number
    of grown connections, ascending position] or zero, and with a gradient of zero. `values` stays the same `Parameter`
    object, and as long as the number of connections does not change, it stays in the same memory. An optimizer's state
    is not looked at here: `offpath.topology` moves both. No other thread may call the layer meanwhile: it would meet
    new connections with old values.
    Raises `PatternError`, before anything is changed, for an edit of another pattern or `grown` of another size.

    >>> from offpath import pattern as patterns
    >>> mask = torch.tensor([[True, True, False], [False, True, False]])
    >>> layer = SparseLinear(3, 2, pattern=patterns.from_mask(mask))
    >>> _ = layer.values.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    >>> change = patterns.edit(layer.pattern, torch.tensor([0]), (torch.tensor([1]), torch.tensor([2])))
    >>> rewire(layer, change)
    >>> layer.to_dense().weight.tolist()
    [[0.0, 2.0, 0.0], [0.0, 3.0, 0.0]]
    """
    check_rewire(layer, edit, grown)
    values = edit.carry(layer.values)
    if grown is not None:
        values[edit.grown_slots] = grown.to(values.dtype)
    gradient = None if layer.values.grad is None else edit.carry(layer.values.grad)
    layer._set_connections(Connections(edit.pattern))
    if edit.pattern.nnz == layer.nnz:
        # Written in place: whoever holds this memory (flat buffers, an optimizer's captured step) goes on holding it.
        layer.values.copy_(values)
        if gradient is not None and layer.values.grad is not None:
            layer.values.grad.copy_(gradient)
        return
    replace_values(layer.values, values)
    layer.values.grad = gradient


def check_rewire(layer: SparseLinear, edit: Edit, grown: Tensor | None = None) -> None:
    """Raise `PatternError` unless `layer` owns its values and `edit` was made from its pattern; changes nothing."""
    if not layer.owns_values:
        raise PatternError(
            "expected a layer with values of its own, got one whose values are computed from others; call "
            "torch.nn.utils.prune.remove(layer, 'values') first"
        )
    source, connections = edit.source, layer._connections
    shape = (layer.out_features, layer.in_features)
    if source.shape != shape or source.nnz != connections.nnz:
        raise PatternError(
            f"expected an edit of a {shape[0]} x {shape[1]} pattern of {connections.nnz} connections, got one of a "
            f"{source.shape[0]} x {source.shape[1]} pattern of {source.nnz}"
        )
    if source.device != connections.device:
        raise PatternError(f"expected an edit on {connections.device}, where the layer is, got one on {source.device}")
    if not connections.are_those_of(source):
        raise PatternError(
            "expected an edit of this layer's pattern, but it was made from other connections; make it with "
            "offpath.pattern.edit(layer.pattern, ...)"
        )
    if grown is not None and grown.shape != edit.grown_slots.shape:
        raise PatternError(
            f"expected a value for each of the {edit.grown_slots.numel()} grown connections, got {tuple(grown.shape)}"
        )
