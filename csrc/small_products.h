// The products over bits: for a few tokens, and between a pattern's values and a dense weight.
#pragma once

#include "bitmap.h"
#include "lanes.h"
#include "products.h"

namespace offpath {

constexpr int64_t rows_per_task = 64;
// Parts that the rows are summed in for the gradient of x: enough for every thread, few enough to be added up quickly.
constexpr int64_t connections_per_part = 1 << 15, most_parts = 32;

// Runs a kernel over `count` things, `step` in one go, as the rows of its block.
template <class Args> void by_rows(Kernel<Args> kernel, const Args &args, int64_t count, int64_t step, int threads) {
    parallel_for(ceil_div(count, step), threads,
                 [&](int64_t i) { kernel(args, {i * step, std::min(count, (i + 1) * step), 0, 0}); });
}

// x - x is NaN for infinities and NaN, and zero else.
template <class T> bool all_finite(const T *x, int64_t count) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        constexpr uint16_t exponent = 0x7F80;
        bool finite = true;
        for (int64_t i = 0; i < count; ++i)
            finite &= (x[i].bits & exponent) != exponent;
        return finite;
    } else {
        T sum = 0;
        for (int64_t i = 0; i < count; ++i)
            sum += x[i] - x[i];
        return sum == 0;
    }
}

// `tokens` rows of a matrix side by side, each `width` entries long and zero from `features` on.
template <class T, class To>
void copy_rows(const Matrix<T> &matrix, int64_t first, int64_t tokens, int64_t features, int64_t width, To *rows) {
    for (int64_t t = 0; t < tokens; ++t) {
        const T *source = matrix.data + (first + t) * matrix.batch_stride;
        To *row = rows + t * width;
        for (int64_t f = 0; f < features; ++f) {
            const T entry = source[f * matrix.feature_stride];
            if constexpr (std::is_same_v<T, To>)
                row[f] = entry;
            else
                row[f] = compute(entry);
        }
        std::fill(row + features, row + width, To{});
    }
}

// The product of spmm for a few tokens, over bits.
template <class T>
void bitmap_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const T *bias, const Matrix<T> &x,
                 int64_t batch, T *y, int threads) {
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const auto rows = scratch<T>(bitmap_batch * width);
    for (int64_t first = 0; first < batch; first += bitmap_batch) {
        const int64_t tokens = std::min<int64_t>(bitmap_batch, batch - first);
        copy_rows(x, first, tokens, view.columns, width, rows.get());
        const bool finite = all_finite(rows.get(), tokens * width);
        const bitmap_args<T> args{view, values, bias, rows.get(), y + first * view.rows, tokens, finite};
        by_rows(kernels.bitmap, args, view.rows, rows_per_task, threads_for(matrix.nnz() * tokens, threads));
    }
}

// dx[b, c] = sum over the connections of column c of value * dy[b, row]. Parts of the rows are summed apart; how many
// parts there are must not depend on the threads, or the result would.
template <class T>
void bitmap_dx(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Matrix<T> &dy, int64_t batch,
               T *dx, int threads) {
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const int64_t count = std::clamp<int64_t>(matrix.nnz() / connections_per_part, 1, most_parts);
    const int64_t rows_per_part = ceil_div(view.rows, count);
    const auto dy_rows = scratch<Sum<T>>(bitmap_batch * view.rows);
    const auto parts = scratch<Sum<T>>(count * bitmap_batch * width);
    for (int64_t first = 0; first < batch; first += bitmap_batch) {
        const int64_t tokens = std::min<int64_t>(bitmap_batch, batch - first);
        copy_rows(dy, first, tokens, view.rows, view.rows, dy_rows.get());
        const bool finite = all_finite(dy_rows.get(), tokens * view.rows);
        const int workers = threads_for(matrix.nnz() * tokens, threads);
        parallel_for(count, workers, [&](int64_t part) {
            Sum<T> *sums = &parts[part * tokens * width];
            std::fill_n(sums, tokens * width, Sum<T>{});
            const int64_t begin = std::min(view.rows, part * rows_per_part);
            kernels.bitmap_dx({view, values, dy_rows.get(), sums, tokens, finite},
                              {begin, std::min(view.rows, begin + rows_per_part), 0, 0});
        });
        const add_parts_args<T> sum{parts.get(), count, tokens, width, dx + first * view.columns, view.columns};
        parallel_for(ceil_div(view.columns, columns_per_pack), workers, [&](int64_t i) {
            const int64_t begin = i * columns_per_pack;
            kernels.add_parts(sum, {0, tokens, begin, std::min(view.columns, begin + columns_per_pack)});
        });
    }
}

// The weight gradient for a few tokens, over bits.
template <class T>
void bitmap_dvalues(const Kernels<T> &kernels, const BitMatrix &matrix, const Matrix<T> &dy, const Matrix<T> &x,
                    int64_t batch, T *dvalues, int threads) {
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const auto dy_rows = scratch<Sum<T>>(batch * view.rows), x_rows = scratch<Sum<T>>(batch * width);
    copy_rows(dy, 0, batch, view.rows, view.rows, dy_rows.get());
    copy_rows(x, 0, batch, view.columns, width, x_rows.get());
    by_rows(kernels.bitmap_dvalues, {view, dy_rows.get(), x_rows.get(), dvalues, batch}, view.rows, rows_per_task,
            threads_for(matrix.nnz() * batch + matrix.rows * matrix.columns, threads));
}

// dense[r, c] = the value of connection (r, c), or zero.
template <class T>
void expand(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, T *dense, int threads) {
    const expand_args<T> args{matrix.view(), values, dense};
    by_rows(kernels.expand, args, matrix.rows, rows_per_task, threads_for(matrix.rows * matrix.columns, threads));
}

// values[s] = dense[row of s, column of s]
template <class T>
void compress(const Kernels<T> &kernels, const BitMatrix &matrix, const T *dense, T *values, int threads) {
    const compress_args<T> args{matrix.view(), dense, values};
    by_rows(kernels.compress, args, matrix.rows, rows_per_task, threads_for(matrix.rows * matrix.columns, threads));
}

} // namespace offpath
