// What the variants (compiled once per ISA) and the rest of the module agree on. Only fixed-width integers and
// plain structs may live here: anything with a function body could be emitted as a weak symbol by a variant.
#pragma once

#include <cstdint>

namespace offpath {

// A sparse matrix in canonical CSR: columns strictly ascending inside each row.
struct Csr {
    const int32_t *crow_indices; // [rows + 1]
    const int32_t *col_indices;  // [nnz]
    int64_t rows;
};

// A rectangle of the output: rows of the sparse matrix, columns of the batch.
struct Block {
    int64_t row_begin, row_end;
    int64_t batch_begin, batch_end;
};

// y[r, b] = bias[r] + sum over the connections s of row r of values[s] * x[col_indices[s], b].
template <class T> struct spmm_args {
    Csr csr;
    const T *values; // [nnz]
    const T *bias;   // [rows], or null for zero
    const T *x;      // [columns, batch], rows `x_stride` elements apart
    int64_t x_stride;
    T *y; // [rows, batch], rows `y_stride` elements apart
    int64_t y_stride;
    int64_t batch;
};

// dvalues[s] = sum over b of dy[row of s, b] * x[col_indices[s], b].
template <class T> struct sddmm_args {
    Csr csr;
    const T *dy; // [rows, batch], rows `dy_stride` elements apart
    int64_t dy_stride;
    const T *x; // [columns, batch], rows `x_stride` elements apart
    int64_t x_stride;
    T *dvalues; // [nnz]
    int64_t batch;
};

// destination[c, r] = source[r, c]; the block's rows are those of the source, its batch the source's columns.
template <class T> struct transpose_args {
    const T *source;
    int64_t source_stride;
    T *destination;
    int64_t destination_stride;
};

// Rows that share the loads of x in the bucketed product. Each accumulates in registers of its own.
constexpr int group_rows = 6;
constexpr int group_masks = 1 << group_rows;

// A pattern prepared for the bucketed product. The rows are taken in groups; in a group, a column's mask says which
// of the rows have a connection to it. The columns of a group stand sorted by mask, the values in the order in which
// the product uses them: column by column, inside a column by row.
struct BucketPlan {
    const int32_t *mask_counts;  // [groups, group_masks]: how many columns of the group have each mask
    const int32_t *column_order; // the columns of group g start at group_begin[g]
    const int32_t *slots;        // [nnz]: which of the caller's values stands here; group g starts at group_begin[g]
    const int32_t *group_begin;  // [groups + 1]
    int64_t rows, columns, groups;
};

// The activations as panels: panel p holds `panel_width` neighbours of the batch, column by column; the last panel
// is as wide as the vectors that it fills.
template <class T> struct pack_args {
    const T *x; // [columns, batch] with these strides, one of which is 1
    int64_t x_feature_stride, x_batch_stride;
    T *panels;
    int64_t columns, batch;
};

// y[b, r] = bias[r] + sum over the connections of row r of value * x[column, b], for a block of groups x panels.
template <class T> struct bucketed_args {
    BucketPlan plan;
    const T *values; // [nnz], in the plan's order
    const T *bias;   // [rows], or null for zero
    const T *panels;
    T *y; // [batch, rows], contiguous
    int64_t batch;
};

struct KernelTable {
    const char *isa;
    int32_t panel_bytes; // width of a panel in bytes of one column
#define OFFPATH_KERNEL(op, suffix, T) void (*op##_##suffix)(const op##_args<T> &, const Block &);
#include "kernels.def"
#undef OFFPATH_KERNEL
};

} // namespace offpath
