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

struct KernelTable {
    const char *isa;
#define OFFPATH_KERNEL(op, suffix, T) void (*op##_##suffix)(const op##_args<T> &, const Block &);
#include "kernels.def"
#undef OFFPATH_KERNEL
};

} // namespace offpath
