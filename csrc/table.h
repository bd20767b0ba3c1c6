// What the variants (compiled once per ISA) and the rest of the module agree on: the operands of every kernel, and the
// table of them.
#pragma once

#include "amx_args.h"
#include "basics.h"
#include "int8_args.h"
#include "plan_args.h"
#include "plane_args.h"
#include "row_args.h"
#include "sparse_row_args.h"

namespace offpath {

// y[b, r] = bias[r] + sum over the connections s of row r of values[s] * x[col_indices[s], b].
template <class T> struct spmm_args {
    Csr csr;
    const T *values; // [nnz]
    const T *bias;   // [rows], or null for zero
    const Sum<T> *x; // [columns, batch], rows `x_stride` elements apart: whole registers, or the features of one token
    int64_t x_stride;
    T *y; // [batch, rows], contiguous
    int64_t batch;
};

// destination[c, r] = source[r, c]; the block's rows are those of the source, its batch the source's columns.
template <class T> struct to_features_args {
    const T *source;
    int64_t source_row_stride, source_column_stride; // one of them is 1
    Sum<T> *destination;                             // zero from the last row of the source on
    int64_t destination_stride;
};

// The values in the order of the plan; the block's rows are groups.
template <class T> struct gather_args {
    BucketPlan plan;
    const T *values; // [nnz], as the caller has them
    void *ordered;   // as many values of the layout's type as the plan has slots
};

// The activations as panels: panel p holds `panel_width` neighbours of the batch, column by column; the last panel
// is as wide as the vectors that it fills. Where columns are multiplied in pairs, one column of zeros follows.
template <class T> struct pack_args {
    const T *x; // [columns, batch] with these strides, one of which is 1
    int64_t x_feature_stride, x_batch_stride;
    void *panels;
    int64_t columns, batch;
};

// y[b, r] = bias[r] + sum over the connections of row r of value * x[column, b], for a block of groups x panels.
template <class T> struct bucketed_args {
    BucketPlan plan;
    const void *values; // in the plan's order
    const T *bias;      // [rows], or null for zero
    const void *panels;
    T *y; // [batch, rows], contiguous, or [rows, batch] where feature_major
    int64_t batch;
    bool feature_major;
};

// The same over tiles of run_rows rows, for a block of rows of tiles (at most tile_rows_together) x strips of panels;
// with scales, y[b, r] = bias[r] + scales[r] * sum.
template <class T> struct runs_args {
    TilePlan plan;
    const Sum<T> *values; // [nnz], in the plan's order
    const float *scales;  // [rows], or null for one
    const T *bias;        // [rows], or null for zero
    const void *panels;
    T *y; // [batch, rows], contiguous, or [rows, batch] where feature_major
    int64_t batch;
    bool feature_major;
};

// sums[s] (+)= sum over b of dy[row of s, b] * x[col_indices[s], b], for a block of rows x panels; the panels from 0
// on start the sum, later ones add to it. The panels that end the batch also write dvalues, if that is another array.
template <class T> struct sddmm_args {
    Csr csr;
    const void *dy, *x; // panels
    int64_t columns, batch;
    Sum<T> *sums; // [nnz]
    T *dvalues;   // [nnz]
};

// dvalues[s] = sum over b of dy[row of s, b] * x[column of s, b]; the block's rows are tiles. `sums` is working memory.
template <class T> struct tiled_args {
    TilePlan plan;
    const void *dy, *x; // panels
    int64_t batch;      // at least 1
    Sum<T> *sums;       // [nnz]
    T *dvalues;         // [nnz]
};

// sums[r] = sum over b of dy[r, b], for a block of rows.
template <class T> struct row_sums_args {
    const void *dy; // panels
    int64_t rows, batch;
    T *sums; // [rows]
};

// y[b, r] = bias[r] + sum over the connections of row r of value * x[b, column], for at most bitmap_batch tokens. The
// block's rows are rows.
constexpr int bitmap_batch = 8;
template <class T> struct bitmap_args {
    Bitmap bitmap;
    const T *values; // [nnz]
    const T *bias;   // [rows], or null for zero
    const T *x;      // [batch, 64 * words_per_row], zero from `columns` on
    T *y;            // [batch, rows], contiguous
    int64_t batch;
    bool x_is_finite; // neither an infinity nor a NaN in x; else batch is 1
};

// sums[b, column] += sum over the rows of the block of value * dy[b, row], for at most bitmap_dx_batch tokens: values
// are spread into lanes once for all of them.
constexpr int bitmap_dx_batch = 16;
template <class T> struct bitmap_dx_args {
    Bitmap bitmap;
    const T *values;
    const void *dy; // [batch, rows], of the panels' type, tokens `dy_stride` apart
    Sum<T> *sums;   // [batch, 64 * words_per_row], tokens `sums_stride` apart
    int64_t batch, dy_stride, sums_stride;
    bool dy_is_finite;
};

// y[b, c] = sum over the parts of parts[part, b, c]; the block's rows are tokens, its batch columns.
template <class T> struct add_parts_args {
    const Sum<T> *parts; // [count, batch, stride]
    int64_t count, batch, stride;
    T *y; // [batch, columns], contiguous
    int64_t columns;
};

// dvalues[s] = sum over b of dy[b, row of s] * x[b, column of s]; the block's rows are rows.
template <class T> struct bitmap_dvalues_args {
    Bitmap bitmap;
    // [batch, rows] and [batch, 64 * words_per_row] of Sum<T>, tokens `dy_stride` and `x_stride` apart; or, where there
    // are pairs, of two tokens each, the last of which may be zeros.
    const void *dy, *x;
    T *dvalues;                         // [nnz]
    int64_t batch, dy_stride, x_stride; // at least 1 token
};

// dense[r, c] = the value of connection (r, c), or zero.
template <class T> struct expand_args {
    Bitmap bitmap;
    const T *values;
    T *dense; // [rows, columns], contiguous
};

// values[s] = dense[row of s, column of s]
template <class T> struct compress_args {
    Bitmap bitmap;
    const T *dense;
    T *values;
};

// int8 values in the order of the plan, in the type that T is multiplied in.
template <class T> struct gather_int8_args {
    BucketPlan plan;
    const int8_t *values; // [nnz], as the caller has them
    void *ordered;
};

// The product of bucketed with what gather_int8 wrote.
template <class T> struct bucketed_int8_args {
    BucketPlan plan;
    const void *values;
    const float *scales; // [rows]
    const T *bias;       // [rows], or null for zero
    const void *panels;
    T *y; // [batch, rows], contiguous
    int64_t batch;
};

// The products that fill absent connections with zeros, in tiles that stay in cache.
//
// y[b, r] = bias[r] + sum over the columns c of W[r, c] * x[b, c], for a block of groups x panels. Values of int8 are
// summed as they are, and a finished sum is multiplied by its row's scale.
template <class T> struct filled_args {
    Bitmap bitmap;
    AnyValues<T> weight;
    const T *bias;      // [rows], or null for zero
    const void *panels; // of x
    T *y;               // [batch, rows], contiguous, or [rows, batch] where feature_major
    int64_t batch;
    bool feature_major;
    // Working memory in the type of panels: the rows of tile_groups groups, each of whole words, tile_stride entries
    // apart.
    void *tile;
    int64_t tile_stride;
};

// dx[b, c] = sum over the rows r of W[r, c] * dy[b, r], for a block of chunks x panels; a chunk is chunk_columns
// columns of W, in whole words and whole groups.
constexpr int64_t chunk_columns = 192;
// Tokens, at most, that are multiplied with one tile of the weight: filling it costs little beside.
constexpr int64_t tokens_per_tile = 256;
template <class T> struct filled_dx_args {
    Bitmap bitmap;
    const int32_t *chunk_slots; // where each chunk of each row begins: [rows, chunks]
    const T *values;            // [nnz]
    const void *panels;         // of dy
    T *dx;                      // [batch, columns], contiguous, or [columns, batch] where feature_major
    int64_t batch;
    bool feature_major;
    int64_t rows_per_fill; // rows of a chunk that are filled in one go, an even number
    // Working memory: chunk_columns x rows_per_fill, in the type of panels; and, where there are more rows, the sums of
    // tokens_per_tile tokens of a chunk.
    void *tile;
    Sum<T> *sums;
};

// dvalues[s] = sum over b of dy[b, row of s] * x[b, column of s], for a block of groups (at most groups_per_gradient)
// x panels of x. In these panels, features and batch have changed places.
constexpr int64_t groups_per_gradient = 16;
template <class T> struct filled_dvalues_args {
    Bitmap bitmap;
    const void *dy, *x; // panels of dy: [features, tokens]; panels of x: [tokens, features]
    int64_t batch;
    T *dvalues; // [nnz]
};

// How an ISA lays out panels and ordered values of a dtype.
struct Layout {
    int32_t panel_width, panel_entry_bytes, value_bytes, columns_per_step, strip_width;
    int32_t run_panels; // of a strip in the product over runs; 0 where plans are buckets
};

// The kernels of one ISA for one dtype.
template <class T> struct Kernels {
#define OFFPATH_KERNEL(op) void (*op)(const op##_args<T> &, const Block &);
#include "kernels.def"
#undef OFFPATH_KERNEL
    Layout layout;
    const AmxKernels *amx; // what computes the filled products of bfloat16 and those of int8 instead, or null
};

struct KernelTable {
    const char *isa;
    Kernels<float> f32;
    Kernels<double> f64;
    Kernels<bfloat16> bf16;
};

} // namespace offpath
