// The products on sparse rows as they are called: cut into blocks for the threads, and so that what is read again and
// again stays in cache.
#pragma once

#include "products.h"
#include "transposed.h"

namespace offpath {

// Entries of a task: so many that the hand-out costs nothing, so few that the threads end together.
constexpr int64_t entries_per_task = 256;

inline int64_t row_tasks(const Csr &rows) {
    return ceil_div(rows.crow_indices[rows.rows] + rows.rows, entries_per_task);
}

// y[b] (+)= sum over the entries of row b of value * weight[index]; y is [rows, width].
template <class T>
void rows_matmul(const Kernels<T> &kernels, const Csr &rows, const T *values, Rows<const T> weight, int64_t width,
                 Rows<T> y, bool add, int64_t strip, int threads) {
    if (rows.rows == 0 || width == 0)
        return;
    const rows_matmul_args<T> args{rows, values, weight, y, add};
    const Blocks blocks = Blocks::of(rows, width, strip ? strip : width, row_tasks(rows));
    const int64_t work = (rows.crow_indices[rows.rows] + rows.rows) * width;
    parallel_for(blocks.count(), threads_for(work, threads), [&](int64_t i) { kernels.rows_matmul(args, blocks[i]); });
}

// dots[s] = <dy[b], weight[index]> for the entries s of row b.
template <class T>
void rows_dots(const Kernels<T> &kernels, const Csr &rows, Rows<const T> dy, Rows<const T> weight, int64_t width,
               T *dots, int64_t strip, int threads) {
    const int64_t nnz = rows.crow_indices[rows.rows];
    if (width == 0) {
        std::fill_n(dots, nnz, T{});
        return;
    }
    const auto sums = scratch<Sum<T>>(strip ? nnz : 0);
    const rows_dots_args<T> args{rows, dy, weight, width, sums.get(), dots};
    const Blocks blocks = Blocks::of(rows, width, strip ? strip : width, row_tasks(rows));
    // A strip adds to the sums of the one before, so it starts when that is done.
    const int64_t strips = ceil_div(width, strip ? strip : width), per_strip = blocks.count() / strips;
    for (int64_t s = 0; s < strips; ++s)
        parallel_for(per_strip, threads_for((nnz + rows.rows) * width, threads),
                     [&](int64_t i) { kernels.rows_dots(args, blocks[s * per_strip + i]); });
}

// gradient[c] (+)= sum over the entries at column c of value * dy[row of the entry].
template <class T>
void rows_weight_gradient(const Kernels<T> &kernels, const Csr &rows, const T *values, Rows<const T> dy,
                          int64_t columns, int64_t width, Rows<T> gradient, bool add, int threads) {
    const Transposed transposed(rows, columns);
    const int64_t nnz = rows.crow_indices[rows.rows];
    const auto ordered = scratch<T>(nnz);
    for (int64_t s = 0; s < nnz; ++s)
        ordered[s] = values[transposed.permutation()[s]];
    rows_matmul(kernels, transposed.view(), ordered.get(), dy, width, gradient, add, 0, threads);
}

} // namespace offpath
