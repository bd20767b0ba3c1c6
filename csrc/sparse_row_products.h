// The products of sparse rows with a sparse weight as they are called: cut into blocks for the threads.
#pragma once

#include "lanes.h"
#include "row_products.h"

namespace offpath {

// Multiply-adds of a task, and the most rows whose sums are in memory at once.
constexpr int64_t connections_per_task = 1 << 14, rows_at_once = 64;

// Multiply-adds of a product of rows with a weight of so many inputs, if these are used evenly.
inline int64_t sparse_work(const Csr &rows, const Csr &connections) {
    const double entries = rows.crow_indices[rows.rows], inputs = std::max<double>(connections.rows, 1);
    return rows.rows + static_cast<int64_t>(entries * connections.crow_indices[connections.rows] / inputs);
}

// y[b] = sum over the entries of row b of value * weight[index]. The entries of a few rows are summed in parts, enough
// for every thread; how many must not depend on the threads, or the result would.
template <class T>
void sparse_matmul(const Kernels<T> &kernels, const Csr &rows, const T *values, const SparseWeight<T> &weight,
                   int64_t width, T *y, int threads) {
    if (rows.rows == 0)
        return;
    constexpr int64_t most_parts = 8, tasks = 32, lanes = 64 / sizeof(Sum<T>);
    const int64_t work = sparse_work(rows, weight.connections);
    const int64_t parts = std::clamp<int64_t>(std::min(tasks, work / connections_per_task) / rows.rows, 1, most_parts);
    const int64_t step = ceil_div(rows.rows, ceil_div(rows.rows, rows_at_once));
    const int64_t padded = ceil_div(width, lanes) * lanes;
    const auto sums = scratch<Sum<T>>(parts * step * padded);
    const int workers = threads_for(work + rows.rows * width, threads);
    for (int64_t first = 0; first < rows.rows; first += step) {
        const int64_t count = std::min(step, rows.rows - first);
        const sparse_matmul_args<T> args{rows, values, weight, sums.get(), parts, first, count, padded};
        const add_parts_args<T> sum{sums.get(), parts, count, padded, y + first * width, width};
        parallel_for(count * parts, workers, [&](int64_t i) {
            const int64_t row = i / parts, part = i % parts;
            kernels.sparse_matmul(args, {first + row, first + row + 1, part, part + 1});
            if (parts == 1)
                kernels.add_parts(sum, {row, row + 1, 0, width});
        });
        if (parts > 1)
            parallel_for(ceil_div(width, columns_per_pack), workers, [&](int64_t i) {
                kernels.add_parts(sum, {0, count, i * columns_per_pack, std::min(width, (i + 1) * columns_per_pack)});
            });
    }
}

// A matrix in the type of the sums, its rows contiguous: itself, or a copy.
template <class T> class SumRows {
  public:
    SumRows(Rows<const T> matrix, int64_t rows, int64_t width, int threads) {
        if constexpr (std::is_same_v<T, Sum<T>>) {
            data = matrix.data;
            stride = matrix.stride;
        } else {
            copy = scratch<Sum<T>>(rows * width);
            parallel_for(rows, threads_for(rows * width, threads), [&](int64_t r) {
                for (int64_t c = 0; c < width; ++c)
                    copy[r * width + c] = compute(matrix.data[r * matrix.stride + c]);
            });
            data = copy.get();
            stride = width;
        }
    }
    const Sum<T> *data;
    int64_t stride;

  private:
    Scratch<Sum<T>> copy;
};

// dots[s] = <dy[b], weight[index]> for the entries s of row b.
template <class T>
void sparse_dots(const Kernels<T> &kernels, const Csr &rows, Rows<const T> dy, const SparseWeight<T> &weight,
                 int64_t width, T *dots, int threads) {
    const SumRows<T> sums(dy, rows.rows, width, threads);
    const sparse_dots_args<T> args{rows, weight, sums.data, sums.stride, dots};
    const int64_t work = sparse_work(rows, weight.connections);
    const Blocks blocks = Blocks::of(rows, 1, 1, work / connections_per_task);
    parallel_for(blocks.count(), threads_for(work, threads), [&](int64_t i) { kernels.sparse_dots(args, blocks[i]); });
}

// gradient[s] = sum over the entries at input i of value * dy[row of the entry, o] for the connections s = (i, o).
template <class T>
void sparse_weight_gradient(const Kernels<T> &kernels, const Csr &rows, const T *values, Rows<const T> dy,
                            const Csr &connections, int64_t width, T *gradient, int threads) {
    const Transposed users(rows, connections.rows);
    const auto ordered = users.order(values);
    const SumRows<T> sums(dy, rows.rows, width, threads);
    const sparse_gradient_args<T> args{users.view(), ordered.get(), connections, sums.data, sums.stride, gradient};
    const int64_t work = sparse_work(rows, connections) + connections.crow_indices[connections.rows];
    const Blocks blocks = Blocks::of(connections, 1, 1, work / connections_per_task);
    parallel_for(blocks.count(), threads_for(work, threads),
                 [&](int64_t i) { kernels.sparse_gradient(args, blocks[i]); });
}

} // namespace offpath
