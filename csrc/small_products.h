// The products over bits: for a few tokens, and between a pattern's values and a dense weight.
#pragma once

#include "bitmap.h"
#include "products.h"

namespace offpath {

constexpr int64_t rows_per_task = 64;

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

// The product of spmm for a few tokens, over bits.
template <class T>
void bitmap_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const T *bias, const Matrix<T> &x,
                 int64_t batch, T *y, int threads) {
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const auto rows = scratch<T>(bitmap_batch * width);
    for (int64_t first = 0; first < batch; first += bitmap_batch) {
        const int64_t tokens = std::min<int64_t>(bitmap_batch, batch - first);
        for (int64_t t = 0; t < tokens; ++t) {
            const T *source = x.data + (first + t) * x.batch_stride;
            if (x.feature_stride == 1)
                std::copy_n(source, view.columns, &rows[t * width]);
            else
                for (int64_t c = 0; c < view.columns; ++c)
                    rows[t * width + c] = source[c * x.feature_stride];
            std::fill(&rows[t * width] + view.columns, &rows[t * width] + width, T{});
        }
        const bool finite = all_finite(rows.get(), tokens * width);
        const bitmap_args<T> args{view, values, bias, rows.get(), y + first * view.rows, tokens, finite};
        by_rows(kernels.bitmap, args, view.rows, rows_per_task, threads_for(matrix.nnz() * tokens, threads));
    }
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
