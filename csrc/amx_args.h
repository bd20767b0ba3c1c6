// The operands of the products that AMX multiplies: of bfloat16 or int8, absent connections filled with zeros as in the
// filled products of table.h. Factors are cut into tiles of 16 rows of 64 bytes, a register each.
#pragma once

#include "int8_args.h"

namespace offpath {

// A tile of the left factor is 16 rows x 32 of the inner dimension; one of the right factor is 16 pairs of neighbours
// of the inner dimension x 16 columns. Tiles that follow one another along the inner dimension are a strip.
constexpr int64_t strip_lines = 16, tile_depth = 32, tile_entries = strip_lines * tile_depth;
// Tiles of int8 have 64 of the inner dimension, and four neighbours instead of two.
template <class Entry> constexpr int64_t entries_of_tile = strip_lines * 64 / static_cast<int64_t>(sizeof(Entry));
constexpr int64_t int8_entries = entries_of_tile<int8_t>;
// Two strips are multiplied with two at a time. Their sums: [32, 32].
constexpr int64_t pair_lines = 2 * strip_lines, pair_sums = pair_lines * pair_lines;
// Tiles of a strip that are filled and multiplied before the next strip has its turn, so that they stay in the
// first-level cache.
constexpr int64_t tiles_per_step = 8;
// What a task has at most: rows of the weight in the product, fewer where totals of int8 lie in the cache beside the
// sums; rows and columns in the weight gradient.
constexpr int64_t amx_rows = 256, dots_rows = 128, gradient_rows = 256, gradient_columns = 512;

// A matrix [inner, lines] as strips: an even number of them, zeros where the matrix ends.
struct pack_tiles_args {
    const bfloat16 *matrix;
    int64_t inner_stride, line_stride; // one of them is 1
    bfloat16 *tiles;
    int64_t inner, lines;
    bool right; // as the right factor
};

// y[b, r] = bias[r] + sum over the columns c of W[r, c] * x[b, c], for a block of strips of rows (whole pairs, amx_rows
// at most) x strips of tokens.
struct amx_product_args {
    Bitmap bitmap;
    AnyValues<bfloat16> weight;
    const bfloat16 *bias; // [rows], or null for zero
    const bfloat16 *x;    // right factor of columns x tokens
    bfloat16 *y;          // [batch, rows], contiguous, or [rows, batch] where feature_major
    int64_t batch;
    bool feature_major;
    // Working memory: the strips of the rows, tiles_per_step each, and the sums of all pairs of the block.
    bfloat16 *filled;
    float *sums;
};

// From one filled strip to the next one, in entries. A line of all strips is written at a time: a cache line more than
// their tiles take, or all would share one set of the first-level cache.
constexpr int64_t dx_strip_stride = tiles_per_step * tile_entries + tile_depth;

// dx[b, c] = sum over the rows r of W[r, c] * dy[b, r], for a block of chunks x strips of tokens.
struct amx_dx_args {
    Bitmap bitmap;
    const int32_t *chunk_slots;
    const bfloat16 *values; // [nnz]
    const bfloat16 *dy;     // left factor of tokens x rows
    bfloat16 *dx;           // [batch, columns], contiguous, or [columns, batch] where feature_major
    int64_t batch;
    bool feature_major;
    bfloat16 *filled; // the strips of the chunks, dx_strip_stride apart
    float *sums;
};

// dvalues[s] = sum over b of dy[b, row of s] * x[b, column of s], for a block of strips of rows x strips of columns,
// whole pairs each.
struct amx_dvalues_args {
    Bitmap bitmap;
    const bfloat16 *dy, *x; // left factor of rows x tokens, right factor of tokens x columns
    int64_t batch;          // at least 1
    bfloat16 *dvalues;      // [nnz]
    float *sums;
};

// sums[line] = sum over the inner dimension of a left factor, for a block of strips.
struct line_sums_args {
    const bfloat16 *tiles;
    bfloat16 *sums; // [lines]
    int64_t inner, lines;
};

// The levels of quantise_tokens, whose blocks are strips here, become a right factor of int8 where they stand.
struct level_tiles_args {
    uint8_t *levels;
    int64_t words; // of columns, a tile each
};

// totals[b, r] = sum over the columns c of value * x[b, c] in whole numbers, for a block of strips of rows (whole
// pairs, dots_rows at most) x strips of tokens.
struct amx_dots_args {
    Bitmap bitmap;
    const int8_t *values; // [nnz]
    const int8_t *x;      // right factor of columns x tokens
    int32_t *totals;      // of the block, whole pairs of strips; tokens lie totals_stride apart
    int64_t totals_stride;
    // Working memory, as in the product.
    int8_t *filled;
    int32_t *sums;
};

struct AmxKernels {
    void (*pack)(const pack_tiles_args &, const Block &);
    void (*product)(const amx_product_args &, const Block &);
    void (*dx)(const amx_dx_args &, const Block &);
    void (*dvalues)(const amx_dvalues_args &, const Block &);
    void (*line_sums)(const line_sums_args &, const Block &);
    void (*level_tiles)(const level_tiles_args &, const Block &);
    void (*dots)(const amx_dots_args &, const Block &);
};

} // namespace offpath
