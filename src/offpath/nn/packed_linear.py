"""`PackedSparseLinear`: a `SparseLinear` for an NVIDIA GPU that answers a few tokens at a time, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offpath.nn.linear import SparseLinear
from offpath.ops.packed_linear import (
    MAX_TOKENS,
    Kind,
    Packed,
    pack,
    packed_linear,
    tokens_that_pay,
    unpack,
    written_out,
)
from offpath.pattern import Pattern


class PackedSparseLinear(nn.Module):
    """A sparse linear layer whose weight lies in memory as a GPU decodes it: less is read than of a dense one.

    Input [..., in_features], output [..., out_features], float32 or bfloat16 like the layer it is made from. Up to
    `tokens` tokens are computed from the packed weight (unstructured, 4 bits a column from a density of about 12 % on),
    more of them by torch from the dense one. `prefer="speed"` keeps that beside; `"memory"` writes it out anew in every
    call of many tokens, which is slow. It holds buffers and no parameters. Made by `from_sparse`; raises `RuntimeError`
    for an input that requires a gradient.

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
    bias: Tensor | None
    weight: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, tokens: int, weight: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.tokens = tokens
        for name in ("values", "columns", "gaps", "group_offsets", "slots"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", bias)
        self.register_buffer("weight", weight, persistent=False)

    @classmethod
    @torch.no_grad()
    def from_sparse(cls, layer: SparseLinear, tokens: int | None = None, prefer: str = "speed") -> PackedSparseLinear:
        """The packed layer that computes what `layer` does; shares no memory with it.

        Up to how many `tokens` (at most 8) the packed weight is read is measured against the dense one on the layer's
        GPU, in milliseconds, unless it is given. Raises `KernelError` for a dtype or a size that has no packed form,
        and, where `tokens` is not given, without a GPU whose kernels can run; `ValueError` for tokens beyond 8.
        """
        if tokens is not None and not 0 <= tokens <= MAX_TOKENS:
            raise ValueError(f"expected tokens from 0 to {MAX_TOKENS}, got {tokens}")
        if prefer not in ("speed", "memory"):
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
        pattern = layer.pattern
        packed = pack(pattern.crow_indices, pattern.col_indices, layer.values.detach(), layer.in_features)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        weight = written_out(packed) if prefer == "speed" or tokens is None else None
        if tokens is None:
            assert weight is not None
            tokens = tokens_that_pay(packed, weight, bias)
        return cls(packed, bias, tokens, weight if prefer == "speed" else None).train(layer.training)

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
        return packed_linear(x, self.packed, self.bias, self.tokens, self.weight)

    @property
    def packed(self) -> Packed:
        """The weight as the kernel reads it."""
        shape = self.out_features, self.in_features
        kind: Kind = "c16" if self.gaps is None else "n4"
        return Packed(kind, shape, self.group_offsets, self.values, self.columns, self.gaps, self.slots)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.slots.numel()}, kind={self.packed.kind!r}, tokens={self.tokens}"
        )
