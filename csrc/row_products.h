// The products on sparse rows as they are called: cut into blocks for the threads.
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
                 Rows<T> y, bool add, int threads) {
    if (width == 0)
        return;
    const rows_matmul_args<T> args{rows, values, weight, y, add};
    const Blocks blocks = Blocks::of(rows, width, width, row_tasks(rows));
    const int64_t work = (rows.crow_indices[rows.rows] + rows.rows) * width;
    parallel_for(blocks.count(), threads_for(work, threads), [&](int64_t i) { kernels.rows_matmul(args, blocks[i]); });
}

// dots[s] = <dy[b], weight[index]> for the entries s of row b.
template <class T>
void rows_dots(const Kernels<T> &kernels, const Csr &rows, Rows<const T> dy, Rows<const T> weight, int64_t width,
               T *dots, int threads) {
    const rows_dots_args<T> args{rows, dy, weight, width, dots};
    const Blocks blocks = Blocks::of(rows, 1, 1, row_tasks(rows));
    const int64_t work = (rows.crow_indices[rows.rows] + rows.rows) * width;
    parallel_for(blocks.count(), threads_for(work, threads), [&](int64_t i) { kernels.rows_dots(args, blocks[i]); });
}

// gradient[c] (+)= sum over the entries at column c of value * dy[row of the entry].
template <class T>
void rows_weight_gradient(const Kernels<T> &kernels, const Csr &rows, const T *values, Rows<const T> dy,
                          int64_t columns, int64_t width, Rows<T> gradient, bool add, int threads) {
    const Transposed users(rows, columns);
    const auto ordered = users.order(values);
    rows_matmul(kernels, users.view(), ordered.get(), dy, width, gradient, add, threads);
}

} // namespace offpath
