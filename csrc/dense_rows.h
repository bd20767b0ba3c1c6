// Sparse rows with their zeros, and back: rows that are nearly full are multiplied densely.
#pragma once

#include "lanes.h"
#include "row_products.h"

namespace offpath {

// The entries may stand in any order and repeat: those at one place are added up and rounded once.
template <class T>
void write_row_out_in_any_order(const int32_t *indices, const T *values, int64_t entries, int64_t columns, T *dense) {
    const auto sums = scratch<Sum<T>>(columns);
    std::fill_n(sums.get(), columns, Sum<T>{});
    for (int64_t s = 0; s < entries; ++s)
        sums[indices[s]] += compute(values[s]);
    for (int64_t c = 0; c < columns; ++c)
        if constexpr (sizeof(T) < sizeof(Sum<T>))
            dense[c] = narrow(sums[c]);
        else
            dense[c] = sums[c];
}

template <class T>
void write_row_out(const int32_t *indices, const T *values, int64_t entries, int64_t columns, T *dense) {
    std::fill_n(dense, columns, T{});
    int32_t last = -1;
    for (int64_t s = 0; s < entries; ++s) {
        if (indices[s] <= last)
            return write_row_out_in_any_order(indices, values, entries, columns, dense);
        last = indices[s];
        dense[last] = values[s];
    }
}

// dense[b, index] = the sum of the values of row b at index; [rows, columns].
template <class T> void rows_written_out(const Csr &rows, const T *values, int64_t columns, T *dense, int threads) {
    const Blocks blocks = Blocks::of(rows, 1, 1, row_tasks(rows));
    parallel_for(blocks.count(), threads_for(rows.rows * columns, threads), [&](int64_t i) {
        for (int64_t b = blocks[i].row_begin; b < blocks[i].row_end; ++b) {
            const int32_t begin = rows.crow_indices[b];
            write_row_out(rows.col_indices + begin, values + begin, rows.crow_indices[b + 1] - begin, columns,
                          dense + b * columns);
        }
    });
}

// picked[s] = dense[b, index] for the entries s of row b.
template <class T> void rows_picked(const Csr &rows, const T *dense, int64_t columns, T *picked, int threads) {
    const Blocks blocks = Blocks::of(rows, 1, 1, row_tasks(rows));
    parallel_for(blocks.count(), threads_for(rows.crow_indices[rows.rows], threads), [&](int64_t i) {
        for (int64_t b = blocks[i].row_begin; b < blocks[i].row_end; ++b)
            for (int32_t s = rows.crow_indices[b]; s < rows.crow_indices[b + 1]; ++s)
                picked[s] = dense[b * columns + rows.col_indices[s]];
    });
}

} // namespace offpath
