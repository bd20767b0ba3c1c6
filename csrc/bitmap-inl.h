// Products over a matrix of bits: the values of a row stand side by side in memory as the caller has them, and the
// bits say into which lanes they are spread. For a few tokens this reads fewer bytes than any list of columns from
// about 6 % of connections on; the same bits write the weight out dense and pick the entries of a dense gradient.
#pragma once

#include "layout-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// One register of neighbouring columns.
template <class T> struct ColumnVector {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int columns = S::lanes;
    using V = typename S::V;
    static constexpr bool stored_as_summed = sizeof(T) == sizeof(offpath::Sum<T>);
    static V load_where(const T *p, uint32_t bits) {
        if constexpr (stored_as_summed) {
            return S::load_where(p, bits);
        } else {
            offpath::Sum<T> selected[columns];
            load_lanes_where(p, bits, columns, selected);
            return S::load(selected);
        }
    }
    static V expand(const T *packed, uint32_t bits) {
        if constexpr (stored_as_summed) {
            return S::expand(packed, bits);
        } else {
            T spread[columns];
            expand_lanes(packed, bits, columns, spread);
            return S::load_first(spread, columns);
        }
    }
    static void store_first(T *p, V a, int64_t n) { S::store_first(p, a, n); }
    static void compress(const T *spread, uint32_t bits, T *packed) {
        if constexpr (stored_as_summed)
            S::compress(spread, bits, packed);
        else
            compress_lanes(spread, bits, columns, packed);
    }
    static typename S::V multiply_add(V a, V b, typename S::V sum) { return S::fma(a, b, sum); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <> struct ColumnVector<bfloat16> : BfloatPairs {
    static constexpr int columns = entries;
    static __m512 multiply_add(V a, V b, __m512 sum) { return dot(a, b, sum); }
};
#endif

// Calls body(first column, bits, values of these columns) for each register full of columns of a row.
template <class T, class Value, class Body>
[[gnu::always_inline]] inline void each_column_vector(const offpath::Bitmap &bitmap, int64_t row, Value *values,
                                                      const Body &body) {
    constexpr int columns = ColumnVector<T>::columns;
    values += bitmap.crow_indices[row];
    for (int64_t w = 0; w < bitmap.words_per_row; ++w) {
        const uint64_t word = bitmap.words[row * bitmap.words_per_row + w];
        for (int c = 0; c < 64; c += columns) {
            const uint32_t bits = static_cast<uint32_t>(word >> c & ((uint64_t{1} << columns) - 1));
            body(w * 64 + c, bits, values);
            values += __builtin_popcount(bits);
        }
    }
}

template <class T, int tokens> void bitmap_rows(const offpath::bitmap_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    const int64_t width = 64 * args.bitmap.words_per_row;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        typename S::V acc[tokens];
        for (int t = 0; t < tokens; ++t)
            acc[t] = S::zero();
        each_column_vector<T>(args.bitmap, row, args.values, [&](int64_t column, uint32_t bits, const T *values) {
            const typename C::V spread = C::expand(values, bits);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) // masked: an infinite input must not meet the zero of a missing weight
                acc[t] = C::multiply_add(spread, C::load_where(args.x + t * width + column, bits), acc[t]);
        });
        typename S::V totals[S::lanes];
        for (int first = 0; first < tokens; first += S::lanes) {
            for (int i = 0; i < S::lanes; ++i)
                totals[i] = first + i < tokens ? acc[first + i] : S::zero();
            offpath::Sum<T> sums[S::lanes];
            S::store(sums, sum_each<offpath::Sum<T>>(totals));
            for (int i = 0; i < S::lanes && first + i < tokens; ++i) {
                const offpath::Sum<T> y = sums[i] + (args.bias ? compute(args.bias[row]) : 0);
                S::store_first(args.y + (first + i) * args.bitmap.rows + row, S::set1(y), 1);
            }
        }
    }
}

template <class T> void bitmap(const offpath::bitmap_args<T> &args, const offpath::Block &block) {
    switch (args.batch) {
    case 1:
        return bitmap_rows<T, 1>(args, block);
    case 2:
        return bitmap_rows<T, 2>(args, block);
    case 3:
        return bitmap_rows<T, 3>(args, block);
    case 4:
        return bitmap_rows<T, 4>(args, block);
    case 5:
        return bitmap_rows<T, 5>(args, block);
    case 6:
        return bitmap_rows<T, 6>(args, block);
    case 7:
        return bitmap_rows<T, 7>(args, block);
    case 8:
        return bitmap_rows<T, 8>(args, block);
    }
}

template <class T> void expand(const offpath::expand_args<T> &args, const offpath::Block &block) {
    using C = ColumnVector<T>;
    const int64_t columns = args.bitmap.columns;
    for (int64_t row = block.row_begin; row < block.row_end; ++row)
        each_column_vector<T>(args.bitmap, row, args.values, [&](int64_t column, uint32_t bits, const T *values) {
            const int64_t n = columns - column < C::columns ? columns - column : C::columns;
            if (n > 0)
                C::store_first(args.dense + row * columns + column, C::expand(values, bits), n);
        });
}

template <class T> void compress(const offpath::compress_args<T> &args, const offpath::Block &block) {
    using C = ColumnVector<T>;
    const int64_t columns = args.bitmap.columns;
    for (int64_t row = block.row_begin; row < block.row_end; ++row)
        each_column_vector<T>(args.bitmap, row, args.values, [&](int64_t column, uint32_t bits, T *values) {
            if (columns - column >= C::columns)
                C::compress(args.dense + row * columns + column, bits, values);
            else // the last register would be read beyond the row
                for (int c = 0; c < C::columns && bits >> c; ++c)
                    if (bits >> c & 1)
                        *values++ = args.dense[row * columns + column + c];
        });
}

} // namespace
