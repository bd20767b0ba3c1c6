// The products over bits: for a few tokens, and between a pattern's values and a dense weight.
#pragma once

#include "bitmap.h"
#include "lanes.h"
#include "products.h"

#include <array>
#include <bit>

namespace offpath {

// Parts that the rows are summed in for the gradient of x: enough for every thread, few enough to be added up quickly.
constexpr int64_t most_parts = 32;

// From one token's `entries` to the next one's: a cache line more than they take, or those of a few tokens could share
// one set of the first-level cache, which holds eight lines.
template <class Entry> int64_t token_stride(int64_t entries) {
    return entries + 64 / static_cast<int64_t>(sizeof(Entry));
}

template <class T> bool all_finite(const T *x, int64_t count) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    constexpr int mantissa = sizeof(T) == 8 ? 52 : sizeof(T) == 4 ? 23 : 7;
    constexpr Bits exponent = static_cast<Bits>((sizeof(T) == 8 ? 0x7FF : 0xFF) * (uint64_t{1} << mantissa));
    bool finite = true;
    for (int64_t i = 0; i < count; ++i)
        finite &= (std::bit_cast<Bits>(x[i]) & exponent) != exponent;
    return finite;
}

// Calls copy(stride of the features): a constant where they stand side by side, for which the compiler has vectors.
template <class T, class Copy> void with_feature_stride(const Matrix<T> &matrix, const Copy &copy) {
    if (matrix.feature_stride == 1)
        copy(std::integral_constant<int64_t, 1>{});
    else
        copy(matrix.feature_stride);
}

// `tokens` rows of a matrix side by side, each `width` entries long and zero from `features` on.
template <class T, class To>
void copy_rows(const Matrix<T> &matrix, int64_t first, int64_t tokens, int64_t features, int64_t width, To *rows) {
    with_feature_stride(matrix, [&](auto stride) {
        for (int64_t t = 0; t < tokens; ++t) {
            const T *source = matrix.data + (first + t) * matrix.batch_stride;
            To *row = rows + t * width;
            for (int64_t f = 0; f < features; ++f)
                if constexpr (std::is_same_v<T, To>)
                    row[f] = source[f * stride];
                else
                    row[f] = compute(source[f * stride]);
            std::fill(row + features, row + width, To{});
        }
    });
}

// The same with the entries of two tokens in one; an odd one is paired with zeros.
inline void copy_pairs(const Matrix<bfloat16> &matrix, int64_t tokens, int64_t features, int64_t width,
                       uint32_t *rows) {
    with_feature_stride(matrix, [&](auto stride) {
        for (int64_t t = 0; t < tokens; t += 2) {
            const bfloat16 *source = matrix.data + t * matrix.batch_stride;
            uint32_t *row = rows + t / 2 * width;
            if (t + 1 < tokens)
                for (int64_t f = 0; f < features; ++f)
                    row[f] = source[f * stride].bits |
                             static_cast<uint32_t>(source[matrix.batch_stride + f * stride].bits) << 16;
            else
                for (int64_t f = 0; f < features; ++f)
                    row[f] = source[f * stride].bits;
            std::fill(row + features, row + width, 0);
        }
    });
}

// Rows of tokens as an ISA multiplies few of them: in the type of the sums, or in pairs.
template <class T>
Scratch<Sum<T>> rows_or_pairs(const Kernels<T> &kernels, const Matrix<T> &matrix, int64_t tokens, int64_t features,
                              int64_t width) {
    auto rows = scratch<Sum<T>>(tokens * width);
    if constexpr (std::is_same_v<T, bfloat16>)
        if (kernels.layout.columns_per_step == 2) {
            static_assert(sizeof(Sum<T>) == sizeof(uint32_t));
            copy_pairs(matrix, tokens, features, width, reinterpret_cast<uint32_t *>(rows.get()));
            return rows;
        }
    copy_rows(matrix, 0, tokens, features, width, rows.get());
    return rows;
}

// Calls product(x, tokens, whether x is finite, y, block of rows) for at most bitmap_batch of the tokens at a time, as
// if all were finite (where any is), and then for each that is not. The values of a block that the first of them have
// brought into the cache serve the others.
template <class T, class Product>
void over_bits(const BitMatrix &matrix, const Matrix<T> &x, int64_t batch, T *y, int threads, const Product &product) {
    constexpr int64_t most_tokens = 8 * bitmap_batch; // or a copy of many would be large
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const auto rows = scratch<T>(std::min(most_tokens, batch) * width);
    for (int64_t begin = 0; begin < batch; begin += most_tokens) {
        const int64_t tokens = std::min(most_tokens, batch - begin);
        copy_rows(x, begin, tokens, view.columns, width, rows.get());
        std::array<int64_t, most_tokens> not_finite;
        int64_t count = 0;
        for (int64_t t = 0; t < tokens; ++t)
            if (!all_finite(rows.get() + t * width, width))
                not_finite[count++] = t;
        by_rows(view.rows, threads_for(matrix.nnz() * tokens, threads), [&](const Block &block) {
            const auto multiply = [&](int64_t first, int64_t together, bool finite) {
                product(rows.get() + first * width, together, finite, y + (begin + first) * view.rows, block);
            };
            for (int64_t first = 0; first < tokens && count < tokens; first += bitmap_batch)
                multiply(first, std::min<int64_t>(bitmap_batch, tokens - first), true);
            for (int64_t i = 0; i < count; ++i)
                multiply(not_finite[i], 1, false);
        });
    }
}

// The product of spmm for a few tokens, over bits.
template <class T>
void bitmap_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const T *bias, const Matrix<T> &x,
                 int64_t batch, T *y, int threads) {
    over_bits(matrix, x, batch, y, threads,
              [&](const T *rows, int64_t tokens, bool finite, T *of_tokens, const Block &block) {
                  kernels.bitmap({matrix.view(), values, bias, rows, of_tokens, tokens, finite}, block);
              });
}

// One part of the rows after the other, each summed apart, for the gradient of x for at most bitmap_dx_batch tokens.
template <class T> class InputGradientParts {
  public:
    InputGradientParts(const Kernels<T> &kernels, const bitmap_dx_args<T> &args, int64_t rows_per_part)
        : kernel(kernels.bitmap_dx), args(args), rows_per_part(rows_per_part) {}

    int64_t tasks() const { return ceil_div(args.bitmap.rows, rows_per_part); }
    void run(int64_t part) const {
        bitmap_dx_args<T> own = args;
        own.sums += part * args.batch * args.sums_stride;
        std::fill_n(own.sums, args.batch * args.sums_stride, Sum<T>{});
        const int64_t begin = part * rows_per_part;
        kernel(own, {begin, std::min(args.bitmap.rows, begin + rows_per_part), 0, 0});
    }

  private:
    const Kernel<bitmap_dx_args<T>> kernel;
    const bitmap_dx_args<T> args;
    const int64_t rows_per_part;
};

// dx[b, c] = sum over the connections of column c of value * dy[b, row], with dy copied to rows of `Entry`. Parts of
// the rows are summed apart; how many parts there are must not depend on the threads, or the result would. What stands
// `beside` it runs in the first round of the threads, of which there are `threads_beside` then.
template <class T, class Entry, class... Beside>
void bitmap_dx_of(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Matrix<T> &dy,
                  int64_t batch, T *dx, int threads, int threads_beside, const Beside &...beside) {
    const Bitmap view = matrix.view();
    const int64_t dy_stride = token_stride<Entry>(view.rows);
    const int64_t stride = token_stride<Sum<T>>(64 * view.words_per_row);
    const int64_t rows_per_part = std::max(rows_per_block, ceil_div(view.rows, most_parts));
    const int64_t count = ceil_div(view.rows, rows_per_part), most_tokens = std::min<int64_t>(bitmap_dx_batch, batch);
    const auto dy_rows = scratch<Entry>(most_tokens * dy_stride);
    const auto sums = scratch<Sum<T>>(count * most_tokens * stride);
    for (int64_t first = 0; first < batch; first += bitmap_dx_batch) {
        const int64_t tokens = std::min<int64_t>(bitmap_dx_batch, batch - first);
        copy_rows(dy, first, tokens, view.rows, dy_stride, dy_rows.get());
        const bool finite = all_finite(dy_rows.get(), tokens * dy_stride);
        const int workers = threads_for(matrix.nnz() * tokens, threads);
        const InputGradientParts<T> parts(
            kernels, {view, values, dy_rows.get(), sums.get(), tokens, dy_stride, stride, finite}, rows_per_part);
        if (first == 0)
            run_together(std::max(workers, threads_beside), beside..., parts);
        else
            run_together(workers, parts);
        const add_parts_args<T> sum{sums.get(), count, tokens, stride, dx + first * view.columns, view.columns};
        parallel_for(ceil_div(view.columns, columns_per_pack), workers, [&](int64_t i) {
            const int64_t begin = i * columns_per_pack;
            kernels.add_parts(sum, {0, tokens, begin, std::min(view.columns, begin + columns_per_pack)});
        });
    }
}

// The gradient of x for a few tokens, over bits.
template <class T, class... Beside>
void bitmap_dx(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Matrix<T> &dy, int64_t batch,
               T *dx, int threads, int threads_beside = 1, const Beside &...beside) {
    if constexpr (std::is_same_v<T, bfloat16>)
        if (kernels.layout.columns_per_step == 2)
            return bitmap_dx_of<T, T>(kernels, matrix, values, dy, batch, dx, threads, threads_beside, beside...);
    bitmap_dx_of<T, Sum<T>>(kernels, matrix, values, dy, batch, dx, threads, threads_beside, beside...);
}

// The weight gradient for a few tokens, but at least one, over bits.
template <class T> class BitmapGradient {
  public:
    BitmapGradient(const Kernels<T> &kernels, const BitMatrix &matrix, const Matrix<T> &dy, const Matrix<T> &x,
                   int64_t batch, T *dvalues)
        : work(matrix.nnz() * batch + matrix.rows * matrix.columns), dy_stride(token_stride<Sum<T>>(matrix.rows)),
          x_stride(token_stride<Sum<T>>(64 * matrix.view().words_per_row)),
          dy_rows(rows_or_pairs(kernels, dy, batch, matrix.rows, dy_stride)),
          x_rows(rows_or_pairs(kernels, x, batch, matrix.columns, x_stride)), kernel(kernels.bitmap_dvalues),
          args{matrix.view(), dy_rows.get(), x_rows.get(), dvalues, batch, dy_stride, x_stride} {}

    int64_t tasks() const { return ceil_div(args.bitmap.rows, rows_per_block); }
    void run(int64_t task) const {
        const int64_t begin = task * rows_per_block;
        kernel(args, {begin, std::min(args.bitmap.rows, begin + rows_per_block), 0, 0});
    }

    const int64_t work;

  private:
    const int64_t dy_stride, x_stride;
    const Scratch<Sum<T>> dy_rows, x_rows;
    const Kernel<bitmap_dvalues_args<T>> kernel;
    const bitmap_dvalues_args<T> args;
};

template <class T>
void bitmap_dvalues(const Kernels<T> &kernels, const BitMatrix &matrix, const Matrix<T> &dy, const Matrix<T> &x,
                    int64_t batch, T *dvalues, int threads) {
    if (batch == 0) {
        std::fill_n(dvalues, matrix.nnz(), T{});
        return;
    }
    const BitmapGradient<T> gradient(kernels, matrix, dy, x, batch, dvalues);
    run_together(threads_for(gradient.work, threads), gradient);
}

// dense[r, c] = the value of connection (r, c), or zero.
template <class T>
void expand(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, T *dense, int threads) {
    const expand_args<T> args{matrix.view(), values, dense};
    by_rows(matrix.rows, threads_for(matrix.rows * matrix.columns, threads),
            [&](const Block &block) { kernels.expand(args, block); });
}

// values[s] = dense[row of s, column of s]
template <class T>
void compress(const Kernels<T> &kernels, const BitMatrix &matrix, const T *dense, T *values, int threads) {
    const compress_args<T> args{matrix.view(), dense, values};
    by_rows(matrix.rows, threads_for(matrix.rows * matrix.columns, threads),
            [&](const Block &block) { kernels.compress(args, block); });
}

} // namespace offpath
