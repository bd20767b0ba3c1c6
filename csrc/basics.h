// The types that kernels and their callers share. Only fixed-width integers and plain structs may live here and in
// table.h: anything with a function body could be emitted as a weak symbol by a variant.
#pragma once

#include <cstdint>

namespace offpath {

struct bfloat16 {
    uint16_t bits;
};

// The type that sums are kept in.
template <class T> struct sum_of {
    using type = T;
};
template <> struct sum_of<bfloat16> {
    using type = float;
};
template <class T> using Sum = typename sum_of<T>::type;

// A sparse matrix in canonical CSR: columns strictly ascending inside each row.
struct Csr {
    const int32_t *crow_indices; // [rows + 1]
    const int32_t *col_indices;  // [nnz]
    int64_t rows;
};

// A matrix of bits: bit c % 64 of word c / 64 of a row says whether the row has a connection to column c.
struct Bitmap {
    const uint64_t *words; // [rows, words_per_row]
    const int32_t *crow_indices;
    int64_t rows, columns, words_per_row;
};

// A rectangle of the output: rows of the sparse matrix, columns of the batch.
struct Block {
    int64_t row_begin, row_end;
    int64_t batch_begin, batch_end;
};

} // namespace offpath
