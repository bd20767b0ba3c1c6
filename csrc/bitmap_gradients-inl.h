// The gradients of a layer for a few tokens, over the same bits and values as its forward product: each row of the
// weight is read once, as it lies in memory.
#pragma once

#include "bitmap-inl.h"

namespace {

// A register full of columns of T as it is summed.
template <class T> struct ColumnSums {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    static constexpr int vectors = C::columns / S::lanes;
    typename S::V v[vectors];

    [[gnu::always_inline]] void expand(const T *values, uint32_t bits, bool whole) {
        if constexpr (vectors == 1) {
            v[0] = C::expand(values, bits, whole);
        } else {
            T spread[C::columns];
            C::store(spread, C::expand(values, bits, whole));
#pragma GCC unroll 4
            for (int i = 0; i < vectors; ++i)
                v[i] = S::load_first(spread + i * S::lanes, S::lanes);
        }
    }
};

template <class T, bool finite>
void bitmap_dx_rows(const offpath::bitmap_dx_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    using Columns = ColumnSums<T>;
    const int64_t width = 64 * args.bitmap.words_per_row;
    for (int64_t row = block.row_begin; row < block.row_end; ++row)
        each_column_vector<T>(
            args.bitmap, row, args.values,
            [&] [[gnu::always_inline]] (int, int64_t column, uint32_t bits, const T *values, bool whole) {
                Columns spread;
                spread.expand(values, bits, whole);
                for (int64_t t = 0; t < args.batch; ++t) {
                    const typename S::V dy = S::set1(args.dy[t * args.bitmap.rows + row]);
#pragma GCC unroll 4
                    for (int i = 0; i < Columns::vectors; ++i) {
                        offpath::Sum<T> *sums = args.sums + t * width + column + i * S::lanes;
                        if constexpr (finite)
                            S::store(sums, S::fma(dy, spread.v[i], S::load(sums)));
                        else // an infinite gradient would meet a missing weight's zero
                            S::store(sums,
                                     S::add(S::keep_where(S::fma(dy, spread.v[i], S::zero()), bits >> i * S::lanes),
                                            S::load(sums)));
                    }
                }
            });
}

template <class T> void bitmap_dx(const offpath::bitmap_dx_args<T> &args, const offpath::Block &block) {
    args.dy_is_finite ? bitmap_dx_rows<T, true>(args, block) : bitmap_dx_rows<T, false>(args, block);
}

template <class T> void add_parts(const offpath::add_parts_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    for (int64_t t = block.row_begin; t < block.row_end; ++t)
        for (int64_t c = block.batch_begin; c < block.batch_end; c += S::lanes) {
            typename S::V sum = S::zero();
            for (int64_t part = 0; part < args.count; ++part)
                sum = S::add(sum, S::load(args.parts + (part * args.batch + t) * args.width + c));
            const int64_t n = block.batch_end - c < S::lanes ? block.batch_end - c : S::lanes;
            S::store_first(args.y + t * args.columns + c, sum, n);
        }
}

template <class T> void bitmap_dvalues(const offpath::bitmap_dvalues_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    using Columns = ColumnSums<T>;
    using C = ColumnVector<T>;
    const int64_t width = 64 * args.bitmap.words_per_row;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const bool whole = may_spill<T>(args.bitmap, block, row);
        each_column_vector<T>(args.bitmap, row, args.dvalues,
                              [&] [[gnu::always_inline]] (int, int64_t column, uint32_t bits, T *dvalues, bool) {
                                  Columns sums;
                                  for (auto &sum : sums.v)
                                      sum = S::zero();
                                  for (int64_t t = 0; t < args.batch; ++t) {
                                      const typename S::V dy = S::set1(args.dy[t * args.bitmap.rows + row]);
#pragma GCC unroll 4
                                      for (int i = 0; i < Columns::vectors; ++i)
                                          sums.v[i] = S::fma(dy, S::load(args.x + t * width + column + i * S::lanes),
                                                             sums.v[i]);
                                  }
                                  T result[C::columns];
#pragma GCC unroll 4
                                  for (int i = 0; i < Columns::vectors; ++i)
                                      S::store_first(result + i * S::lanes, sums.v[i], S::lanes);
                                  C::compress(result, bits, dvalues, whole);
                              });
    }
}

} // namespace
