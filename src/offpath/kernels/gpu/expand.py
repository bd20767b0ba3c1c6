"""One bit per position of a weight: how it is stored in little memory, and written out for a dense product.

A word holds 32 neighbouring columns of a row; with it stands how many connections come before it. So 8 positions know
where their values lie without a look at any others, and each of them is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.launch import (
    block_of,
    blocks_of,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    launch,
    parts_of,
)
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
    words_of_row = parts_of(columns, _WORD)
    word_of_slot = row_numbers(crow_indices, nnz) * words_of_row + (col_indices >> 5)  # ascends, as slots do
    bounds = torch.arange(rows * words_of_row + 1, device=col_indices.device)
    offsets = torch.searchsorted(word_of_slot, bounds, out_int32=True)[:-1]
    bits = torch.ones_like(word_of_slot) << (col_indices & 31)
    # Each bit stands once, so their sum is their union; whole numbers give the same sum in any order.
    words = bits.new_zeros(rows * words_of_row).index_add_(0, word_of_slot, bits).to(torch.int32)
    shape = rows, words_of_row
    return Bitmap(words.view(shape), offsets.view(shape), columns, nnz)


@triton.jit
def _octets(words, offsets, row, rows, words_of_row, BLOCK: tl.constexpr):
    """(first column of each octet [BLOCK, 1], which of its columns are connected, where their values lie [BLOCK, 8]).

    An octet is 8 columns, a byte of a word; one past the last word or row has no connection.
    """
    octet = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = octet // 4
    shift = octet % 4 * 8
    inside = (word < words_of_row) & (row < rows)
    first_word = row * words_of_row
    bits = tl.load(words + first_word + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    before = tl.load(offsets + first_word + word, mask=inside, other=0)
    lower = bits & ((1 << shift) - 1).to(tl.uint32)  # bits are counted in parallel: in pairs, in nibbles, in bytes
    lower = lower - ((lower >> 1) & 0x55555555)
    lower = (lower & 0x33333333) + ((lower >> 2) & 0x33333333)
    lower = (lower + (lower >> 4)) & 0x0F0F0F0F
    before += ((lower * 0x01010101) >> 24).to(tl.int32)
    eight = (bits >> shift) & 0xFF
    spread = (eight | (eight << 12)) & 0x000F000F  # one bit to a nibble
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    earlier = spread * 0x11111111 - spread  # a nibble's sum of those below it
    bit = tl.arange(0, 8)[None, :]
    live = ((eight[:, None] >> bit) & 1) != 0
    place = before[:, None] + ((earlier[:, None] >> (4 * bit)) & 0xF).to(tl.int32)
    return octet[:, None] * 8, live, place


@triton.jit
def _inside(first, row, rows, columns, ALIGNED: tl.constexpr):
    """Which columns of an octet exist; ALIGNED: all or none, so that they are loaded and stored together."""
    if ALIGNED:
        return tl.broadcast_to((first < columns) & (row < rows), [first.shape[0], 8])
    return (first + tl.arange(0, 8)[None, :] < columns) & (row < rows)


@triton.jit
def expand_kernel(
    words,
    offsets,
    values,
    dense,
    rows,
    words_of_row,
    columns,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dense[row, column] = its value, or zero. Grid (blocks of ROWS rows, blocks of octets)."""
    for step in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        first, live, place = _octets(words, offsets, row, rows, words_of_row, BLOCK)
        value = tl.load(values + place, mask=live, other=0.0)
        target = dense + row * columns + first + tl.arange(0, 8)[None, :]
        tl.store(target, value, mask=_inside(first, row, rows, columns, ALIGNED))


@triton.jit
def compress_kernel(
    words,
    offsets,
    values,
    dense,
    rows,
    words_of_row,
    columns,
    row_stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values[place] = dense[row, column] where a connection is. Grid (blocks of ROWS rows, blocks of octets)."""
    for step in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        first, live, place = _octets(words, offsets, row, rows, words_of_row, BLOCK)
        source = dense + row * row_stride + first + tl.arange(0, 8)[None, :]
        value = tl.load(source, mask=_inside(first, row, rows, columns, ALIGNED), other=0.0)
        tl.store(values + place, value, mask=live)


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


def _launch(kernel: Any, prepared: Bitmap, values: Tensor, dense: Tensor, strides: tuple[int, ...]) -> None:
    rows, words_of_row = prepared.words.shape
    if rows == 0 or words_of_row == 0:
        return
    block = block_of(4 * words_of_row, 1024)
    rows_at_once = min(1024 // block, 4)  # a program of narrow rows needs several to keep enough loads under way
    launch(
        kernel,
        (parts_of(rows, rows_at_once), blocks_of(4 * words_of_row, block)),
        prepared.words,
        prepared.offsets,
        values,
        dense,
        rows,
        words_of_row,
        prepared.columns,
        *strides,
        ALIGNED=prepared.columns % 8 == 0,
        ROWS=rows_at_once,
        BLOCK=block,
        num_warps=max(block // 128, 1),
        num_stages=1,
    )
