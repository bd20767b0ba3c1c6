// The operands of the kernels where both sides are sparse: the rows of activations, and the weight they meet.
#pragma once

#include "basics.h"

namespace offpath {

// A sparse weight from the side of its inputs: row i holds the connections of input i, their outputs ascending.
template <class T> struct SparseWeight {
    Csr connections;
    const T *values;
};

// sums[part, row - first_row, o] = sum over the part's entries of the row of value * weight[index, o], for the block's
// rows; its batch are parts of their entries.
template <class T> struct sparse_matmul_args {
    Csr entries;
    const T *values; // [nnz]
    SparseWeight<T> weight;
    Sum<T> *sums; // [parts, rows, width]
    int64_t parts, first_row, rows, width;
};

// dots[s] = <dy[b], weight[index]> for the entries s of row b; the block's rows.
template <class T> struct sparse_dots_args {
    Csr entries;
    SparseWeight<T> weight;
    const Sum<T> *dy;
    int64_t dy_stride;
    T *dots; // [nnz]
};

// gradient[s] = sum over the entries at input i of value * dy[row of the entry, o] for the connections s = (i, o) of
// the block's inputs.
template <class T> struct sparse_gradient_args {
    Csr users;       // which rows use each input
    const T *values; // [nnz], in the order of the inputs
    Csr connections;
    const Sum<T> *dy;
    int64_t dy_stride;
    T *gradient; // [connections]
};

} // namespace offpath
