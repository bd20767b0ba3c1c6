"""`offpath::packed_linear`: a sparse weight in the formats that few tokens read. For inference: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.kernels import KernelError
from offpath.kernels.gpu.contest import tokens_that_pay as tokens_that_pay
from offpath.kernels.gpu.decode import MAX_TOKENS as MAX_TOKENS, decode
from offpath.kernels.gpu.formats import Kind as Kind, Packed as Packed, pack as pack, unpack as unpack
from offpath.kernels.gpu.tensor_cores import MAX_TILED_TOKENS as MAX_TILED_TOKENS, multiply_tiles
from offpath.kernels.gpu.tiles import Tiles as Tiles, pack_tiles as pack_tiles
from offpath.kernels.operands import in_own_dtype
from offpath.ops.library import as_rows, define, library, nobody_listens
from offpath.pattern import Pattern


def packed_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    tokens: int,
    weight: Tensor | None = None,
    tiles: Tiles | None = None,
    tiled_tokens: int = 0,
) -> Tensor:
    """y = x @ W.T + bias for `x` [..., in]: from the packed weight for up to `tokens` tokens, densely for more.

    Where `tiles` are given, which are the same weight, up to `tiled_tokens` tokens are multiplied by them before that.
    `weight` is the dense [out, in], where it is kept; otherwise it is written out in every call of more tokens. All in
    the dtype of the packed values. Raises `RuntimeError` where a gradient is asked for, and `KernelError` for operands
    that do not fit or kernels that cannot run here.

    >>> packed = pack(torch.tensor([0, 2]).int(), torch.tensor([0, 2]).int(), torch.tensor([1.0, 2.0]), 3)
    >>> packed_linear(torch.tensor([[1.0, 10.0, 100.0]]), packed, None, tokens=0)
    tensor([[201.]])
    """
    # Not by `direct`: to take the parts apart and put them together again is a sixth of the host's time.
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and nobody_listens(x, packed.values, bias):
        return _product(x, packed, bias, tokens, weight, tiles, tiled_tokens)
    parts = packed.values, packed.columns, packed.gaps, packed.group_offsets, packed.slots
    of_tiles = (None,) * 4 if tiles is None else (tiles.values, tiles.places, tiles.gaps, tiles.group_offsets)
    columns = packed.shape[1]
    return torch.ops.offpath.packed_linear.default(x, *parts, *of_tiles, bias, weight, columns, tokens, tiled_tokens)


def written_out(packed: Packed) -> Tensor:
    """The weight dense, [rows, columns]."""
    crow_indices, col_indices, values = unpack(packed)
    return Pattern(packed.shape, crow_indices, col_indices).to_dense(values)


def _forward(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    gaps: Tensor | None,
    group_offsets: Tensor,
    slots: Tensor,
    tile_values: Tensor | None,
    tile_places: Tensor | None,
    tile_gaps: Tensor | None,
    tile_offsets: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    in_features: int,
    tokens: int,
    tiled_tokens: int,
) -> Tensor:
    shape = group_offsets.shape[0] - 1, in_features
    packed = Packed("c16" if gaps is None else "n4", shape, group_offsets, values, columns, gaps, slots)
    tiles = None
    if tile_values is not None:
        assert tile_places is not None and tile_gaps is not None and tile_offsets is not None
        tiles = Tiles(shape, tile_offsets, tile_values, tile_places, tile_gaps)
    return _product(x, packed, bias, tokens, weight, tiles, tiled_tokens)


def _product(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    tokens: int,
    weight: Tensor | None,
    tiles: Tiles | None,
    tiled_tokens: int,
) -> Tensor:
    out_features, in_features = packed.shape
    if x.shape[-1] != in_features or x.dtype is not packed.values.dtype:
        raise KernelError(
            f"expected x of {in_features} features in {packed.values.dtype}, got {tuple(x.shape)} in {x.dtype}; cast "
            "the module or its input"
        )
    rows = as_rows(x)
    if 0 < rows.shape[0] <= tokens:
        _expect_gpu(rows)
        y = decode(packed, rows.contiguous(), bias)
    elif tiles is not None and 0 < rows.shape[0] <= tiled_tokens:
        _expect_gpu(rows)
        y = multiply_tiles(tiles, rows.contiguous(), bias)
    else:
        with in_own_dtype(x):
            y = linear(rows, written_out(packed) if weight is None else weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _expect_gpu(x: Tensor) -> None:
    if not x.is_cuda:
        raise KernelError(
            f"expected tensors on an NVIDIA GPU, where the packed weight is read, got {x.device}; move the module and "
            "its input there, or pack it with tokens=0"
        )


def _fake(x, values, columns, gaps, group_offsets, *_):
    return x.new_empty(*x.shape[:-1], group_offsets.shape[0] - 1)


def _autograd(*operands):
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in operands):
        raise RuntimeError(
            "offpath::packed_linear is for inference only, got an operand that requires a gradient: train the "
            "SparseLinear and pack it afterwards, and run the packed model under torch.inference_mode()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.offpath.packed_linear.default(*operands)


define(
    "packed_linear(Tensor x, Tensor values, Tensor columns, Tensor? gaps, Tensor group_offsets, Tensor slots, "
    "Tensor? tile_values, Tensor? tile_places, Tensor? tile_gaps, Tensor? tile_offsets, Tensor? bias, "
    "Tensor? weight, SymInt in_features, int tokens, int tiled_tokens) -> Tensor",
    _forward,
    _fake,
)
library.impl("packed_linear", _autograd, "Autograd")
