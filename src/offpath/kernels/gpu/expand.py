"""One bit per position of a weight: how it is stored in little memory, and written out for a dense product.

A word holds 32 neighbouring columns of a row; with it stands how many connections come before it. So 8 positions know
where their values lie without a look at any others, and each of them is written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.launch import device_of, expect_indices, expect_operands, expect_rows, expect_shapes
from offpath.kernels.operands import row_numbers

_WORD = 32


@dataclass(frozen=True)
class Bitmap:
    """Where a weight [rows, columns] has connections: bit c % 32 of word c // 32 of a row stands for column c."""

    words: Tensor  # int32 [rows, words of a row]
    offsets: Tensor  # int32, the same shape: how many connections come before the word
    columns: int
    nnz: int

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def bytes(self) -> int:
        return 4 * (self.words.numel() + self.offsets.numel())


def bitmap(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Bitmap:
    """The bitmap of a canonical pattern, by prefix sums on its device."""
    expect_indices(col_indices, crow_indices=crow_indices, col_indices=col_indices)
    expect_rows(crow_indices, col_indices, columns)
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    words_of_row = triton.cdiv(columns, _WORD)
    word_of_slot = row_numbers(crow_indices, nnz) * words_of_row + (
        col_indices >> 5
    )  # ascends: the pattern is canonical
    bounds = torch.arange(rows * words_of_row + 1, device=col_indices.device)
    offsets = torch.searchsorted(word_of_slot, bounds, out_int32=True)[:-1]
    bits = torch.ones_like(word_of_slot) << (col_indices & 31)
    # Each bit stands once, so their sum is their union; whole numbers give the same sum in any order.
    words = bits.new_zeros(rows * words_of_row).index_add_(0, word_of_slot, bits).to(torch.int32)
    shape = rows, words_of_row
    return Bitmap(words.view(shape), offsets.view(shape), columns, nnz)


@triton.jit
def _places(words, offsets, word, octet, inside):
    """For 8 columns of a word: which have a connection, and which values those have; [bytes, 8] from [bytes]."""
    bits = tl.load(words + word, mask=inside, other=0)
    before = tl.load(offsets + word, mask=inside, other=0)
    lower = (bits & ((1 << (8 * octet)) - 1)).to(tl.uint32)
    lower = lower - ((lower >> 1) & 0x55555555)
    lower = (lower & 0x33333333) + ((lower >> 2) & 0x33333333)
    lower = (lower + (lower >> 4)) & 0x0F0F0F0F
    before += ((lower * 0x01010101) >> 24).to(tl.int32)
    eight = (bits >> (8 * octet)) & 0xFF
    # One bit a nibble; then the product with 0x11111111 has in each nibble the sum of those up to it.
    spread = (eight | (eight << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    earlier = spread * 0x11111111 - spread
    nibble = 4 * tl.arange(0, 8)[None, :]
    live = ((eight[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    return live, before[:, None] + ((earlier[:, None] >> nibble) & 0xF)


@triton.jit
def expand_kernel(
    words, offsets, values, dense, octets, octets_of_row, columns, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """dense[position] = its value, or zero; a program writes BLOCK times 8 columns. Grid (blocks)."""
    octet = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = octet < octets
    live, place = _places(words, offsets, octet // 4, (octet % 4).to(tl.int32), inside)
    value = tl.load(values + place, mask=live, other=0.0)
    column = (octet % octets_of_row).to(tl.int32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    target = (octet // octets_of_row)[:, None] * columns + column
    if ALIGNED:  # columns come in whole octets: none of a row's bytes is cut
        written = (inside & ((octet % octets_of_row) * 8 < columns))[:, None]
    else:
        written = inside[:, None] & (column < columns)
    tl.store(dense + target, value, mask=written)


@triton.jit
def compress_kernel(
    words,
    offsets,
    values,
    dense,
    octets,
    octets_of_row,
    columns,
    row_stride,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values[place] = dense[position] where a connection is. Grid (blocks)."""
    octet = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = octet < octets
    live, place = _places(words, offsets, octet // 4, (octet % 4).to(tl.int32), inside)
    column = (octet % octets_of_row).to(tl.int32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    source = (octet // octets_of_row)[:, None] * row_stride + column
    if ALIGNED:
        read = (inside & ((octet % octets_of_row) * 8 < columns))[:, None]
    else:
        read = inside[:, None] & (column < columns)
    tl.store(values + place, tl.load(dense + source, mask=read, other=0.0), mask=live)


def expand(prepared: Bitmap, values: Tensor) -> Tensor:
    """dense[r, c] = the value of connection (r, c), or zero; [rows, columns]."""
    expect_operands(values=values)
    expect_indices(values, words=prepared.words.view(-1))
    expect_shapes(values.shape == (prepared.nnz,), values=values, words=prepared.words)
    dense = values.new_empty(prepared.rows, prepared.columns)
    _launch(expand_kernel, prepared, values.contiguous(), dense, ())
    return dense


def compress(prepared: Bitmap, dense: Tensor) -> Tensor:
    """values[s] = dense[row of s, column of s]; [nnz]."""
    expect_operands(dense=dense)
    expect_indices(dense, words=prepared.words.view(-1))
    expect_shapes(dense.shape == (prepared.rows, prepared.columns), dense=dense, words=prepared.words)
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    values = dense.new_empty(prepared.nnz)
    _launch(compress_kernel, prepared, values, dense, (dense.stride(0),))
    return values


def _launch(kernel, prepared: Bitmap, values: Tensor, dense: Tensor, strides: tuple[int, ...]) -> None:
    octets = 4 * prepared.words.numel()
    if octets == 0:
        return
    block = 512
    with device_of(values):
        kernel[(triton.cdiv(octets, block),)](
            prepared.words,
            prepared.offsets,
            values,
            dense,
            octets,
            4 * prepared.words.shape[1],
            prepared.columns,
            *strides,
            ALIGNED=prepared.columns % 8 == 0,
            BLOCK=block,
            num_warps=4,
            num_stages=1,
        )
