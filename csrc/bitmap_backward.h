// All gradients of a layer at once, for a few tokens: those over a plan are in backward.h.
#pragma once

#include "filled_products.h"
#include "small_products.h"

namespace offpath {

// dbias[r] = sum over the tokens of dy[b, r]
template <class T> class TokenSums {
  public:
    TokenSums(const Matrix<T> &dy, int64_t rows, int64_t batch, T *dbias)
        : dy(dy), rows(rows), batch(batch), dbias(dbias) {}

    int64_t tasks() const { return ceil_div(rows, rows_per_sum); }
    void run(int64_t task) const {
        const int64_t first = task * rows_per_sum, count = std::min(rows_per_sum, rows - first);
        Sum<T> sums[rows_per_sum] = {};
        with_feature_stride(dy, [&](auto stride) {
            for (int64_t b = 0; b < batch; ++b) {
                const T *of_token = dy.data + b * dy.batch_stride + first * dy.feature_stride;
                for (int64_t r = 0; r < count; ++r)
                    sums[r] += compute(of_token[r * stride]);
            }
        });
        for (int64_t r = 0; r < count; ++r)
            if constexpr (std::is_same_v<T, bfloat16>)
                dbias[first + r] = narrow(sums[r]);
            else
                dbias[first + r] = sums[r];
    }

  private:
    const Matrix<T> dy;
    const int64_t rows, batch;
    T *const dbias;
};

// dx [batch, columns], dvalues and dbias; each of the first two with absent connections filled with zeros, if asked to.
// The threads meet as often as for dx alone, and once more where dvalues packs x.
template <class T>
void bitmap_backward(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Matrix<T> &dy,
                     const Matrix<T> &x, int64_t batch, bool fills_dx, bool fills_dvalues, T *dx, T *dvalues, T *dbias,
                     int threads) {
    if (batch == 0) {
        std::fill_n(dvalues, matrix.nnz(), T{});
        std::fill_n(dbias, matrix.rows, T{});
        return;
    }
    const int workers = threads_for((matrix.rows + 1) * matrix.columns * batch, threads);
    const TokenSums<T> of_bias(dy, matrix.rows, batch, dbias);
    with_filled(kernels, [&](const auto &filled) {
        const auto with = [&](const auto &of_values) {
            if (!fills_dx)
                return bitmap_dx(kernels, matrix, values, dy, batch, dx, threads, workers, of_values, of_bias);
            const auto factor = filled.dy_of_dx(dy, matrix.rows, batch);
            run_together(threads_for(matrix.rows * batch, threads), factor);
            run_together(workers, filled.dx(matrix, values, factor, batch, dx, false, workers), of_values, of_bias);
        };
        if (!fills_dvalues)
            return with(BitmapGradient<T>(kernels, matrix, dy, x, batch, dvalues));
        const auto of_dy = filled.dy_of_dvalues(dy, matrix.rows, batch);
        const auto of_x = filled.x_of_dvalues(x, matrix.columns, batch);
        run_together(threads_for((matrix.rows + matrix.columns) * batch, threads), of_dy, of_x);
        with(filled.dvalues(matrix, of_dy, of_x, batch, dvalues));
    });
}

} // namespace offpath
