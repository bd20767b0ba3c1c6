"""`PackedSparseLinear`: a `SparseLinear` for an NVIDIA GPU that answers a few tokens at a time, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offpath.nn.linear import SparseLinear
from offpath.ops.packed_linear import (
    MAX_TILED_TOKENS,
    MAX_TOKENS,
    Kind,
    Packed,
    Tiles,
    pack,
    pack_tiles,
    packed_linear,
    tokens_that_pay,
    unpack,
    written_out,
)
from offpath.pattern import Pattern

_PACKED = ("values", "columns", "gaps", "group_offsets", "slots")
_TILES = ("tile_values", "tile_places", "tile_gaps", "tile_offsets")


class PackedSparseLinear(nn.Module):
    """A sparse linear layer whose weight lies in memory as a GPU decodes it: less is read than of a dense one.

    Input [..., in_features], output [..., out_features], float32 or bfloat16 like the layer it is made from. Up to
    `tokens` tokens are computed from the packed weight (unstructured, 4 bits a column from a density of about 12 % on).
    Up to `tiled_tokens` (bfloat16; 0 for none), another packed copy is multiplied by tensor cores, tile by tile. More
    tokens are computed by torch from the dense weight. `prefer="speed"` keeps that beside; `"memory"` keeps neither it
    nor tiles, and writes it out anew in every call of many tokens, which is slow. It holds buffers and no parameters.
    Made by `from_sparse`; raises `RuntimeError` for an input that requires a gradient.

    >>> sparse = SparseLinear(64, 32, sparsity=0.8)
    >>> layer = PackedSparseLinear.from_sparse(sparse, tokens=0)
    >>> layer
    PackedSparseLinear(in_features=64, out_features=32, bias=True, nnz=410, kind='c16', tokens=0)
    >>> torch.allclose(layer(torch.ones(3, 64)), sparse(torch.ones(3, 64)), atol=1e-5)
    True
    """

    values: Tensor
    columns: Tensor
    gaps: Tensor | None
    group_offsets: Tensor
    slots: Tensor
    tile_values: Tensor | None
    tile_places: Tensor | None
    tile_gaps: Tensor | None
    tile_offsets: Tensor | None
    bias: Tensor | None
    weight: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        tokens: int,
        weight: Tensor | None,
        tiles: Tiles | None = None,
        tiled_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.tokens, self.tiled_tokens = tokens, tiled_tokens
        buffers = {name: getattr(packed, name) for name in _PACKED}
        of_tiles = (None,) * 4 if tiles is None else (tiles.values, tiles.places, tiles.gaps, tiles.group_offsets)
        buffers |= dict(zip(_TILES, of_tiles, strict=True), bias=bias, weight=weight)
        # What there is first: torch.export counts the others among it (torch 2.13).
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, buffer, persistent=name != "weight")

    @classmethod
    @torch.no_grad()
    def from_sparse(
        cls, layer: SparseLinear, tokens: int | None = None, prefer: str = "speed", tiles: bool = False
    ) -> PackedSparseLinear:
        """The packed layer that computes what `layer` does; shares no memory with it.

        Up to how many `tokens` (at most 8) the packed weight is read is measured against the dense one on the layer's
        GPU, in milliseconds, unless it is given. With `tiles`, for bfloat16, the second packed copy competes with both
        for up to 64 tokens, and is kept where it won; tokens beyond 8 ask for it as well. Tiles are off otherwise
        because no GPU has run them yet: their kernel is checked on the CPU and by `make gpu`. Raises `KernelError` for
        a dtype or a size that has no packed form, and, where `tokens` is not given, without a GPU whose kernels can
        run; `ValueError` for tokens beyond 64, for tiles beside `prefer="memory"`, and for layers of another kind.
        """
        if not isinstance(layer, SparseLinear):  # others have patterns that mean something else, or scales
            raise ValueError(f"expected a SparseLinear, got {type(layer).__name__}; SparseLinear.from_dense makes one")
        layer._check_given_away()
        if prefer not in ("speed", "memory"):
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
        if tokens is not None and not 0 <= tokens <= MAX_TILED_TOKENS:
            raise ValueError(f"expected tokens from 0 to {MAX_TILED_TOKENS}, got {tokens}")
        tiles = tiles or (tokens is not None and tokens > MAX_TOKENS)
        if tiles and prefer == "memory":
            raise ValueError(
                f"expected prefer='speed' with tiles, which are a second copy of the weight, got {prefer!r}; take at "
                f"most {MAX_TOKENS} tokens"
            )
        pattern = layer.pattern
        connections = pattern.crow_indices, pattern.col_indices, layer.values.detach(), layer.in_features
        packed = pack(*connections)
        tiled = pack_tiles(*connections) if tiles else None
        bias = None if layer.bias is None else layer.bias.detach().clone()
        weight = written_out(packed) if prefer == "speed" or tokens is None else None
        if tokens is None:
            assert weight is not None
            tokens, tiled_tokens = tokens_that_pay(packed, tiled, weight, bias)
        else:
            tokens, tiled_tokens = min(tokens, MAX_TOKENS), tokens if tokens > MAX_TOKENS else 0
        kept = tiled if tiled_tokens else None
        packed_layer = cls(packed, bias, tokens, weight if prefer == "speed" else None, kept, tiled_tokens)
        return packed_layer.train(layer.training)

    def to_sparse(self) -> SparseLinear:
        """The trainable `SparseLinear` with the same connections and weights."""
        crow_indices, col_indices, values = unpack(self.packed)
        pattern = Pattern((self.out_features, self.in_features), crow_indices, col_indices)
        layer = SparseLinear._holding(pattern, values, True, self)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y = x @ W.T + bias for `x` [..., in_features]."""
        own = self._buffers
        return packed_linear(x, self.packed, own["bias"], self.tokens, own["weight"], self.tiles, self.tiled_tokens)

    @property
    def packed(self) -> Packed:
        """The weight as the kernel reads it."""
        # As attributes, nn.Module would look for each in three places, in Python: together as long as a launch.
        values, columns, gaps, group_offsets, slots = map(self._buffers.__getitem__, _PACKED)
        assert group_offsets is not None and values is not None and columns is not None and slots is not None
        kind: Kind = "c16" if gaps is None else "n4"
        return Packed(kind, (self.out_features, self.in_features), group_offsets, values, columns, gaps, slots)

    @property
    def tiles(self) -> Tiles | None:
        """The weight as tensor cores read it."""
        values, places, gaps, offsets = map(self._buffers.__getitem__, _TILES)
        if offsets is None or values is None or places is None or gaps is None:
            return None
        return Tiles((self.out_features, self.in_features), offsets, values, places, gaps)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *keys_and_errors: list[str]
    ) -> None:
        errors, known = keys_and_errors[-1], len(keys_and_errors[-1])
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *keys_and_errors)
        kept, whole = self._buffers["weight"], prefix + "values" in state_dict and len(errors) == known
        if kept is None or not whole or self.packed.values.is_meta:
            return
        # A checkpoint has the packed weight alone.
        weight = written_out(self.packed)
        if (kept.device, kept.dtype, kept.shape) == (weight.device, weight.dtype, weight.shape):
            with torch.no_grad():
                kept.copy_(weight)  # in its place, where a captured graph reads it
        else:
            self.weight = weight

    def extra_repr(self) -> str:
        tiled = f", tiled_tokens={self.tiled_tokens}" if self.tiled_tokens else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.slots.numel()}, kind={self.packed.kind!r}, tokens={self.tokens}{tiled}"
        )
