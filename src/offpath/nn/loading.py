"""Whether a checkpoint fits a sparse layer: asked before anything of the layer is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offpath.pattern import Pattern, PatternError

if TYPE_CHECKING:
    from offpath.nn.sparse_weight import SparseWeightModule


def load_problem(
    layer: SparseWeightModule, state_dict: dict[str, Any], prefix: str, assign: bool, dense_shape: Any = None
) -> str | None:
    """What is wrong with the entries of a checkpoint that `layer` is to take, with the next step; None if they fit.

    `dense_shape` is that of the layer which the checkpoint was made of, where it says so.
    """
    sources = sources_of_values(layer)
    named = (*sources, "bias", *layer.value_names, *layer.index_names)
    entries = {name: state_dict[prefix + name] for name in named if prefix + name in state_dict}
    kinds = [f"{type(entry).__name__} for {name}" for name, entry in entries.items() if not isinstance(entry, Tensor)]
    if kinds:
        return f"expected tensors, got {', '.join(kinds)}; load a checkpoint that state_dict() gave"
    if not layer.owns_values:
        return _computed_problem(layer, sources, state_dict, prefix)
    names = (*layer.value_names, *layer.index_names)
    missing = [name for name in names if prefix + name not in state_dict]
    if prefix + "weight" in state_dict and missing:
        return (
            "the checkpoint holds a dense weight here, or whoever read it made a dense model of a sparse one; load it "
            f"into the dense model and convert that with {layer.from_dense_by}, or load the state_dict in it yourself"
        )
    if len(missing) == len(names):
        return None  # nothing about this layer: the default loading reports the missing keys
    if missing:
        return (
            f"expected {', '.join(names)}, but {', '.join(missing)} is missing; values without their topology "
            "mean nothing, so save the whole state_dict() and load that; of a checkpoint in several files, load all of "
            "them as one dictionary, or save it in one (max_shard_size)"
        )
    values, crow_indices, col_indices = (state_dict[prefix + name] for name in ("values", *layer.index_names))
    if values.is_meta and not (assign or layer.values.is_meta):
        return "expected tensors with data, got a checkpoint on the meta device"
    if values.dim() != 1 or values.numel() != col_indices.numel():
        return f"expected one value a column, got shapes {tuple(values.shape)} and {tuple(col_indices.shape)}"
    if values.numel() != layer.values.numel() and hasattr(layer.values, "full_tensor"):  # a DTensor
        return (
            f"expected {layer.values.numel()} connections, for which the values are sharded, got {values.numel()}; "
            "load the checkpoint before fully_shard"
        )
    if (values.dtype is torch.int8) != (layer.values.dtype is torch.int8):
        return (
            f"expected values like {layer.values.dtype}, got {values.dtype}; Int8SparseLinear.from_sparse and "
            "to_sparse lead from a layer that fits the checkpoint to the other kind"
        )
    if dense_shape is not None and tuple(dense_shape) != layer.dense_shape:
        return f"expected connections of a weight of shape {layer.dense_shape}, got those of {tuple(dense_shape)}"
    if "scales" in names and state_dict[prefix + "scales"].shape != (layer.out_features,):
        return f"expected scales of shape ({layer.out_features},), got {tuple(state_dict[prefix + 'scales'].shape)}"
    bias = state_dict.get(prefix + "bias")
    if bias is not None and layer.bias is not None and bias.shape != layer.bias.shape:
        return f"expected a bias of shape {tuple(layer.bias.shape)}, got {tuple(bias.shape)}"
    return _topology_problem(layer, crow_indices, col_indices)


def sources_of_values(layer: SparseWeightModule) -> list[str]:
    """What the values of a layer that does not own them are computed from, as torch.nn.utils names it.

    A pruning mask makes `values_orig` and `values_mask` of them, weight_norm `values_g` and `values_v`.
    """
    return [name for name in (*layer._parameters, *layer._buffers) if name.startswith("values_")]


def _computed_problem(
    layer: SparseWeightModule, sources: list[str], state_dict: dict[str, Any], prefix: str
) -> str | None:
    held = [name for name in sources if prefix + name in state_dict]
    if not held:
        return None  # nothing about its values: the default loading reports the missing keys
    missing = [name for name in (*sources, *layer.index_names) if prefix + name not in state_dict]
    if missing:
        return f"expected {', '.join(held)} with the topology that they belong to, but {', '.join(missing)} is missing"
    crow_indices, col_indices = (state_dict[prefix + name] for name in layer.index_names)
    fits = all(state_dict[prefix + name].shape == getattr(layer, name).shape for name in sources)
    if col_indices.numel() != layer.values.numel() or not fits:
        return (
            f"expected {layer.values.numel()} connections, as many as {' and '.join(sources)} are for, got "
            f"{col_indices.numel()}; load the checkpoint into a layer of that many, or make plain values of both first "
            "(torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    return _topology_problem(layer, crow_indices, col_indices)


def _topology_problem(layer: SparseWeightModule, crow_indices: Tensor, col_indices: Tensor) -> str | None:
    try:
        Pattern(layer.pattern_shape, crow_indices, col_indices)
    except PatternError as error:
        return f"the topology does not fit a {layer.out_features} x {layer.in_features} layer: {error}"
    return None
