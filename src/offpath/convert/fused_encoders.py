"""torch's encoders compute a layer in one fused call in inference, from the parameters of the layers in it.

Sparse layers and unpacked attention have others: where one stands, the encoder has to call its layers, as it does in
training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from offpath.nn.attention import UnpackedAttention
from offpath.nn.sparse_weight import CsrWeightModule

# What torch's classes look at before they compute fused, and its value for "no".
SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_FOUND = "_fused_before_sparse_layers"


def fuse_only_dense_encoders(model: nn.Module) -> None:
    """Turn the fused path off in each of torch's encoders that holds what is called, and as it was in the others.

    Whatever swaps layers of `model` has done this; it is for layers that were put into an encoder in other ways.

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> layer.linear1 = SparseLinear(16, 32)
    >>> fuse_only_dense_encoders(layer)
    >>> layer.eval()(torch.ones(1, 3, 16)).shape
    torch.Size([1, 3, 16])
    """
    for encoder, switch, off in _switches(model):
        # What it was stays with the encoder, into copies and pickles.
        attributes = vars(encoder)
        if any(isinstance(module, (CsrWeightModule, UnpackedAttention)) for module in encoder.modules()):
            attributes.setdefault(_FOUND, attributes[switch])
            attributes[switch] = off
        elif _FOUND in attributes:
            attributes[switch] = attributes.pop(_FOUND)


def fused_layers(model: nn.Module, holding: Collection[nn.Module]) -> list[Any]:
    """The encoder layers around any of `holding` that torch computes fused in inference, if the input lets it."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return [
        layer
        for layer in layers
        if layer.activation_relu_or_gelu and layer.self_attn.batch_first and layer.self_attn.in_proj_bias is not None
        if _holds(layer, holding)
    ]


@contextmanager
def called_by_encoders(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """Inside, torch's encoders in `model` that hold any of these `layers` call them, so that hooks see the inputs."""
    found = []
    try:
        for encoder, switch, off in _switches(model):
            if _holds(encoder, layers):
                found.append((encoder, switch, getattr(encoder, switch)))
                setattr(encoder, switch, off)
        yield
    finally:
        for encoder, switch, before in found:
            setattr(encoder, switch, before)


def _holds(encoder: nn.Module, layers: Collection[nn.Module]) -> bool:
    return any(module in layers for module in encoder.modules())


def _switches(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in model.modules():
        for kind, (switch, off) in SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, switch):  # encoders of old pickles have none
                yield module, switch, off
