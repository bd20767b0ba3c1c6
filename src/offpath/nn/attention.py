"""`nn.MultiheadAttention` whose projections are layers of their own, which can be made sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class UnpackedAttention(nn.Module):
    """`nn.MultiheadAttention` that calls `q_proj`, `k_proj`, `v_proj` and `out_proj`, each a linear layer.

    torch's own keeps three of them in one parameter and reads the weight of the fourth, so that nothing can stand in
    their place; here, `offpath.sparsify`, `compress`, `prune` and topologies find plain `nn.Linear` layers.
    `offpath.convert.unpack_attention` puts these in the places of torch's. Arguments, shapes and masks are those of
    `nn.MultiheadAttention`; there is no `add_bias_kv` and no `add_zero_attn`. Raises `ValueError` for sizes that do not
    fit.

    >>> attention = UnpackedAttention(16, 4, batch_first=True)
    >>> x = torch.randn(2, 5, 16)
    >>> [tuple(out.shape) for out in attention(x, x, x)]
    [(2, 5, 16), (2, 5, 5)]
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    # torch's encoder layers ask before they compute fused, from parameters that this does not have.
    in_proj_bias = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"expected an embed_dim that num_heads divides, both positive, got {embed_dim} and {num_heads}"
            )
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        for name, inputs in zip(PROJECTIONS, (embed_dim, self.kdim, self.vdim, embed_dim), strict=True):
            self.register_module(name, nn.Linear(inputs, embed_dim, bias, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's uniform weights for the inputs, as `nn.MultiheadAttention` draws those of `kdim`; no biases."""
        layers = self.projections()
        for layer in layers[:3]:
            nn.init.xavier_uniform_(layer.weight)
        for layer in layers:
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def projections(self) -> list[Any]:
        """The four layers, in the order of `PROJECTIONS`."""
        return [self.get_submodule(name) for name in PROJECTIONS]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), as `nn.MultiheadAttention` has them.

        Raises `ValueError` for inputs and masks of the wrong shape, and for `is_causal` without the mask it hints at.
        """
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "expected query, key and value of three dimensions, or of two without a batch, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.shape[:-1] != value.shape[:-1] or (batched and self._batch(query) != self._batch(key)):
            raise ValueError(
                f"expected as many keys as values, of as many samples as the queries, got shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        if is_causal and attn_mask is None:
            raise ValueError("expected attn_mask with is_causal=True, which only says that the mask is the causal one")
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            attended, weights = _with_weights(q, k, v, mask, dropout)
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch(self, x: Tensor) -> int:
        return x.shape[0 if self.batch_first else 1]

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, embed_dim] as [batch, heads, tokens, width of a head]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys]: minus infinity where nothing is to be seen."""
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        mask = None
        if attn_mask is not None:
            if attn_mask.shape not in ((queries, keys), (batch * heads, queries, keys)):
                raise ValueError(
                    f"expected attn_mask of shape ({queries}, {keys}) or ({batch * heads}, {queries}, {keys}), got "
                    f"{tuple(attn_mask.shape)}"
                )
            mask = _added(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.view(batch, heads, queries, keys)
        if padding is not None:
            if padding.shape != (batch, keys):
                raise ValueError(f"expected key_padding_mask of shape ({batch}, {keys}), got {tuple(padding.shape)}")
            hidden = _added(padding, q.dtype)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        return mask

    @classmethod
    def from_packed(cls, attention: nn.MultiheadAttention) -> UnpackedAttention:
        """The same attention with layers of its own; keeps device, dtype, training mode and `requires_grad`.

        Shares no memory with `attention`. Raises `ValueError` for a module of another kind, and for one with
        `add_bias_kv`, `add_zero_attn` or computed weights.

        >>> UnpackedAttention.from_packed(nn.MultiheadAttention(8, 2)).q_proj
        Linear(in_features=8, out_features=8, bias=True)
        """
        if problem := unpacking_problem(attention):
            raise ValueError(f"expected an attention that can be unpacked, but {problem}")
        unpacked = cls(**_arguments(attention), device="meta")
        for layer, operands in zip(unpacked.projections(), _operands(attention), strict=True):
            layer.weight, layer.bias = operands
        return unpacked.train(attention.training)

    def to_packed(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` that computes the same; shares no memory with this one.

        What trained or not in only some of the three input projections trains in all. Raises `ValueError` unless all
        projections are `nn.Linear`, which `offpath.densify` makes of sparse ones.
        """
        if problem := packing_problem(self):
            raise ValueError(f"expected an attention that can be packed, but {problem}")
        layers = self.projections()
        packed = nn.MultiheadAttention(**_arguments(self), device="meta")
        inputs = layers[:3]
        if packed.in_proj_weight is None:
            for name, layer in zip(PROJECTIONS, inputs, strict=False):
                setattr(packed, f"{name}_weight", _copy(layer.weight))
        else:
            packed.in_proj_weight = _joined([layer.weight for layer in inputs])
        if packed.in_proj_bias is not None:
            packed.in_proj_bias = _joined([layer.bias for layer in inputs])
            packed.out_proj.bias = _copy(layers[3].bias)
        packed.out_proj.weight = _copy(layers[3].weight)
        return packed.train(self.training)


def unpacking_problem(attention: nn.Module) -> str | None:
    """Why there is no `UnpackedAttention` for this module; None if there is."""
    if type(attention) is not nn.MultiheadAttention:
        return f"it is a {type(attention).__name__}"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it has add_bias_kv or add_zero_attn"
    # Those that it does without are there as None.
    names = ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS[:3]))
    computed = [name for name in names if name not in attention._parameters]
    computed += [f"out_proj.{name}" for name in ("weight", "bias") if name not in attention.out_proj._parameters]
    if computed:
        return f"its {' and '.join(computed)} is computed by a mask or parametrization; remove that first"
    return None


def packing_problem(attention: UnpackedAttention) -> str | None:
    """Why there is no `nn.MultiheadAttention` for this one; None if there is."""
    for name, layer in zip(PROJECTIONS, attention.projections(), strict=True):
        if type(layer) is not nn.Linear:
            return f"its {name} is a {type(layer).__name__}; densify the model first"
        if layer._parameters.keys() != {"weight", "bias"}:
            return f"its {name} has other parameters than weight and bias; remove masks first"
    return None


def _arguments(attention: Any) -> dict[str, Any]:
    """What the constructor of either class is given. No method reads a weight: `sparsify` would leave such layers."""
    names = ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first")
    out = attention.out_proj
    return {name: getattr(attention, name) for name in names} | {
        "bias": out.bias is not None,
        "dtype": out.weight.dtype,
    }


def _operands(attention: nn.MultiheadAttention) -> list[tuple[nn.Parameter, nn.Parameter | None]]:
    """Weight and bias of each projection, copied out of what `attention` has."""
    packed = attention.in_proj_weight
    weights = [getattr(attention, f"{name}_weight") for name in PROJECTIONS[:3]] if packed is None else packed.chunk(3)
    biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    out = attention.out_proj
    return [
        (_copy(w), None if b is None else _copy(b))
        for w, b in zip((*weights, out.weight), (*biases, out.bias), strict=True)
    ]


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _joined(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=any(p.requires_grad for p in parts))


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = functional.dropout(weights, dropout)
    return weights @ v, weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(
            f"expected a mask of bool, True where nothing is to be seen, or of numbers to add, got {mask.dtype}"
        )
    return mask.to(dtype)
