"""Sparse rows in EleutherAI's sparsify (`eai-sparsify`): encoder and decoder of its `SparseCoder` on the CPU."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from offpath.kernels import KernelError
from offpath.nn.autocast import under_autocast
from offpath.ops import SparseRows, encode_topk, topk_rows
from offpath.swapins.encoder import LazyPreActivations, activations_at, pre_activations
from offpath.swapins.patching import Patch, SwapInError

try:
    import sparsify.sparse_coder as _coder
    import sparsify.utils as _utils
    from sparsify import SparseCoder
    from sparsify.fused_encoder import EncoderOutput
except ImportError as error:
    raise ImportError(f"expected the package eai-sparsify ({error}); pip install 'offpath[sparsify]'") from error

__all__ = ["Patch", "SwapInError", "decode", "encode", "patch"]

# Whether a loss of the forward pass that is running looks at all pre-activations.
_uses_pre_acts: ContextVar[bool] = ContextVar("uses_pre_acts", default=False)
# Rows of the batch at a time, where all latents are looked at to choose some.
_ROWS = 256


def patch() -> Patch:
    """Let every `SparseCoder` compute with offpath, until `undo()` or the end of a `with` block.

    Tensors on other devices than the CPU go to sparsify's own functions, as before. Raises `SwapInError` for a version
    of sparsify without the functions to replace.

    >>> from sparsify import SparseCoder, SparseCoderConfig
    >>> sae = SparseCoder(8, SparseCoderConfig(k=2))
    >>> with patch():
    ...     out = sae(torch.randn(5, 8))
    >>> out.latent_acts.shape
    torch.Size([5, 2])
    """
    return Patch(
        [
            (_coder, "fused_encoder", encode),
            (_coder, "decoder_impl", decode),
            (_utils, "decoder_impl", decode),
            (SparseCoder, "forward", _forward),
        ]
    )


def encode(
    input: Tensor, weight: Tensor, bias: Tensor, k: int, activation: Literal["groupmax", "topk"]
) -> EncoderOutput:
    """`sparsify.fused_encoder.fused_encoder` with exact gradients.

    `input` [..., width], `weight` [latents, width], `bias` [latents]. The k activations of each row are those of
    relu(input @ weight.T + bias), in ascending order of the latent; one whose ReLU is shut passes no gradient.
    `pre_acts` [..., latents] are computed where a loss uses them, or when they are looked at. Under autocast everything
    is in its dtype. Raises `KernelError` for an unknown activation and for k that does not fit the latents.
    """
    if input.device.type != "cpu":
        return _encode_of_sparsify(input, weight, bias, k, activation)
    x, weight, bias = _operands(input.reshape(-1, input.shape[-1]), weight, bias)
    pre = pre_activations(x, weight, bias) if _uses_pre_acts.get() else None
    if activation == "topk":
        rows = encode_topk(x, weight, bias, k) if pre is None else topk_rows(pre, k)
        values, indices = rows.values, rows.indices
    elif activation == "groupmax":
        indices = _strongest_of_groups(x, weight, bias, k) if pre is None else _group_maxima(pre.detach(), k)
        values = activations_at(indices, x, weight, bias) if pre is None else pre.gather(1, indices.long())
    else:
        raise KernelError(f"expected activation 'topk' or 'groupmax', got {activation!r}")
    leading = input.shape[:-1]
    pre_acts = (
        LazyPreActivations(_all_of_them, x.view(*leading, x.shape[1]), weight, bias)
        if pre is None
        else pre.relu().view(*leading, weight.shape[0])
    )
    return EncoderOutput(values.relu().view(*leading, k), indices.long().view(*leading, k), pre_acts)


def decode(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """`sparsify.utils.decoder_impl`: the sum of the latents' directions, each times its activation.

    `top_indices` and `top_acts` [..., k], `W_dec` [width, latents] of the dtype of the activations: [..., width].
    Raises `KernelError` for indices out of range.
    """
    if top_acts.device.type != "cpu":
        return _decode_of_sparsify(top_indices, top_acts, W_dec)
    k = top_acts.shape[-1]
    rows = SparseRows.from_topk(top_acts.reshape(-1, k), top_indices.reshape(-1, k), W_dec.shape[1])
    return (rows @ W_dec.mT).view(*top_acts.shape[:-1], W_dec.shape[0])


_encode_of_sparsify = _coder.fused_encoder
_decode_of_sparsify = _coder.decoder_impl
_forward_of_sparsify = SparseCoder.forward


def _forward(self: SparseCoder, *args: Any, dead_mask: Tensor | None = None, **options: Any) -> Any:
    """Say to `encode` whether AuxK or MultiTopK are about to use all pre-activations: then one product serves both."""
    uses_them = self.cfg.multi_topk or (dead_mask is not None and bool(dead_mask.any()))
    token = _uses_pre_acts.set(uses_them)
    try:
        return _forward_of_sparsify(self, *args, dead_mask=dead_mask, **options)
    finally:
        _uses_pre_acts.reset(token)


def _operands(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, cast_bias = under_autocast(x, weight, bias)
    assert cast_bias is not None
    return x, weight, cast_bias


def _all_of_them(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = pre_activations(x.reshape(-1, x.shape[-1]), weight, bias)
    return flat.relu().view(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def _strongest_of_groups(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """`_group_maxima` of x @ weight.T + bias, of which a few rows at a time are stored."""
    return torch.cat([_group_maxima(torch.nn.functional.linear(part, weight, bias), k) for part in x.split(_ROWS)])


def _group_maxima(pre: Tensor, k: int) -> Tensor:
    """Where the largest entry of each of k groups of neighbours is, int32 [rows, k]."""
    latents = pre.shape[1]
    if k < 1 or latents % k:
        raise KernelError(f"expected k that divides the {latents} latents into groups, got {k}")
    first = torch.arange(0, latents, latents // k, device=pre.device)
    return (pre.unflatten(1, (k, -1)).argmax(2) + first).int()
