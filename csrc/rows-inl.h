// The products on sparse rows: what the entries name is read, and nothing else.
#pragma once

#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// A register of neighbours in a row of the weight.
template <class T> struct RowVector {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int64_t entries = S::lanes;
    using V = typename S::V;
    static V load(const T *p) { return load_first(p, entries); }
    static V load_first(const T *p, int64_t n) {
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>))
            return n == entries ? S::load(p) : S::load_first(p, n);
        else
            return S::load_first(p, n);
    }
    static typename S::V multiply_add(V a, V b, typename S::V sum) { return S::fma(a, b, sum); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <> struct RowVector<bfloat16> {
    static constexpr int64_t entries = BfloatPairs::entries;
    using S = Simd<float>;
    using V = BfloatPairs::V;
    static V load(const bfloat16 *p) { return BfloatPairs::load(p); }
    static V load_first(const bfloat16 *p, int64_t n) { return BfloatPairs::load_first(p, n); }
    static __m512 multiply_add(V a, V b, __m512 sum) { return BfloatPairs::dot(a, b, sum); }
};
#endif

// Columns whose sums are kept at hand, in the first-level cache.
constexpr int64_t columns_at_hand = 1024;
// Entries whose rows of the weight are read side by side. While they are, the rows of the next ones are fetched: they
// lie anywhere in memory, and the processor cannot know where.
constexpr int entries_together = 4;

template <class T> [[gnu::always_inline]] inline void fetch(const T *p) { __builtin_prefetch(p); }

// One register of sums, and what is added to it: single entries, or pairs of them where the CPU multiplies pairs.
template <class T> struct RowSums {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int64_t columns = S::lanes; // of one step
    static constexpr int64_t entries = 1;        // that one multiplication takes
    using Value = typename S::V;
    static Value value(const T *values, int64_t) { return S::set1(compute(values[0])); }

    static void start(offpath::Sum<T> *sums, const T *y, int64_t n) {
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>))
            S::store(sums, n == columns ? S::load(y) : S::load_first(y, n));
        else
            S::store(sums, S::load_first(y, n));
    }
    template <int together>
    [[gnu::always_inline]] static void add(offpath::Sum<T> *sums, const Value (&values)[together],
                                           const T *const (&rows)[together], int64_t column, int64_t n) {
        typename S::V acc = S::load(sums);
#pragma GCC unroll 8
        for (int i = 0; i < together; ++i)
            acc = S::fma(values[i], RowVector<T>::load_first(rows[i] + column, n), acc);
        S::store(sums, acc);
    }
    static void finish(const offpath::Sum<T> *sums, T *y, int64_t n) {
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>)) {
            if (n == columns)
                return S::store(y, S::load(sums));
        }
        S::store_first(y, S::load(sums), n);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <> struct RowSums<bfloat16> {
    using B = BfloatPairs;
    using S = Simd<float>;
    static constexpr int64_t columns = B::entries, entries = 2;
    using Value = B::V;
    static Value value(const bfloat16 *values, int64_t left) {
        return B::set1(values[0].bits | (left > 1 ? uint32_t{values[1].bits} << 16 : 0));
    }

    static void start(float *sums, const bfloat16 *y, int64_t n) {
        const __m512 first = S::load_first(y, n < S::lanes ? n : S::lanes);
        const __m512 second = S::load_first(y + S::lanes, n < S::lanes ? 0 : n - S::lanes);
        S::store(sums, B::rezip_low(first, second));
        S::store(sums + S::lanes, B::rezip_high(first, second));
    }
    template <int together>
    [[gnu::always_inline]] static void add(float *sums, const Value (&values)[together / 2],
                                           const bfloat16 *const (&rows)[together], int64_t column, int64_t n) {
        __m512 low = S::load(sums), high = S::load(sums + S::lanes);
#pragma GCC unroll 4
        for (int i = 0; i < together / 2; ++i) {
            const B::V a = RowVector<bfloat16>::load_first(rows[2 * i] + column, n);
            // Without a partner a row meets zeros, not what lies in some other row: zero times infinity is NaN.
            const B::V b = rows[2 * i + 1] ? RowVector<bfloat16>::load_first(rows[2 * i + 1] + column, n) : B::zero();
            low = B::dot(values[i], B::zip_low(a, b), low);
            high = B::dot(values[i], B::zip_high(a, b), high);
        }
        S::store(sums, low);
        S::store(sums + S::lanes, high);
    }
    static void finish(const float *sums, bfloat16 *y, int64_t n) {
        const __m512 low = S::load(sums), high = S::load(sums + S::lanes);
        S::store_first(y, B::unzip_low(low, high), n < S::lanes ? n : S::lanes);
        S::store_first(y + S::lanes, B::unzip_high(low, high), n < S::lanes ? 0 : n - S::lanes);
    }
};
#endif

// Adds `count` <= together entries from `s` on to the sums of `columns` columns; the rest of a step has no rows.
template <class T, int together>
[[gnu::always_inline]] inline void add_entries(const offpath::rows_matmul_args<T> &args, int64_t s, int64_t count,
                                               int64_t first_column, int64_t columns, offpath::Sum<T> *sums) {
    using R = RowSums<T>;
    const int64_t nnz = args.entries.crow_indices[args.entries.rows];
    const auto row_of = [&](int64_t entry) {
        return args.weight.data + args.entries.col_indices[entry] * args.weight.stride + first_column;
    };
    const T *rows[together], *next[together];
    typename R::Value values[together / R::entries];
    for (int i = 0; i < together; ++i) {
        rows[i] = i < count ? row_of(s + i) : nullptr;
        next[i] = row_of(s + count + i < nnz ? s + count + i : s);
        if (i % R::entries == 0)
            values[i / R::entries] = R::value(args.values + s + i, count - i);
    }
    int64_t column = 0;
    for (; column + R::columns <= columns; column += R::columns) {
#pragma GCC unroll 8
        for (int i = 0; i < together; ++i)
            fetch(next[i] + column);
        R::template add<together>(sums + column, values, rows, column, R::columns);
    }
    if (column < columns)
        R::template add<together>(sums + column, values, rows, column, columns - column);
}

// Block: rows are rows of y, batch its columns.
template <class T> void rows_matmul(const offpath::rows_matmul_args<T> &args, const offpath::Block &block) {
    using R = RowSums<T>;
    alignas(64) offpath::Sum<T> sums[columns_at_hand];
    for (int64_t column = block.batch_begin; column < block.batch_end; column += columns_at_hand) {
        const int64_t left = block.batch_end - column, columns = left < columns_at_hand ? left : columns_at_hand;
        for (int64_t row = block.row_begin; row < block.row_end; ++row) {
            const int64_t begin = args.entries.crow_indices[row], end = args.entries.crow_indices[row + 1];
            if (args.add && begin == end)
                continue;
            T *y = args.y.data + row * args.y.stride + column;
            for (int64_t c = 0; c < columns; c += R::columns)
                if (args.add)
                    R::start(sums + c, y + c, columns - c < R::columns ? columns - c : R::columns);
                else
                    for (int64_t i = c; i < c + R::columns; ++i)
                        sums[i] = 0;
            int64_t s = begin;
            for (; s + entries_together <= end; s += entries_together)
                add_entries<T, entries_together>(args, s, entries_together, column, columns, sums);
            for (; s < end; s += R::entries)
                add_entries<T, R::entries>(args, s, end - s < R::entries ? end - s : R::entries, column, columns, sums);
            for (int64_t c = 0; c < columns; c += R::columns)
                R::finish(sums + c, y + c, columns - c < R::columns ? columns - c : R::columns);
        }
    }
}

// Block: rows are rows of dy.
template <class T> void rows_dots(const offpath::rows_dots_args<T> &args, const offpath::Block &block) {
    using R = RowVector<T>;
    using S = typename R::S;
    constexpr int together = summed_together<offpath::Sum<T>>;
    const int64_t columns = args.width, whole = columns / R::entries * R::entries;
    const int64_t nnz = args.entries.crow_indices[args.entries.rows];
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const T *dy = args.dy.data + row * args.dy.stride;
        const int64_t end = args.entries.crow_indices[row + 1];
        for (int64_t s = args.entries.crow_indices[row]; s < end; s += together) {
            const int64_t count = end - s < together ? end - s : together;
            const T *sources[together];
            typename S::V acc[together];
            const T *next[together];
            const auto row_of = [&](int64_t entry) {
                return args.weight.data + args.entries.col_indices[entry] * args.weight.stride;
            };
            for (int i = 0; i < together; ++i) {
                sources[i] = row_of(s + (i < count ? i : 0));
                next[i] = row_of(s + count + i < nnz ? s + count + i : s);
                acc[i] = S::zero();
            }
            for (int64_t c = 0; c < whole; c += R::entries) {
                const typename R::V a = R::load(dy + c);
#pragma GCC unroll 4
                for (int i = 0; i < together; ++i) {
                    fetch(next[i] + c);
                    acc[i] = R::multiply_add(a, R::load(sources[i] + c), acc[i]);
                }
            }
            if (whole < columns) {
                const typename R::V a = R::load_first(dy + whole, columns - whole);
                for (int i = 0; i < together; ++i)
                    acc[i] = R::multiply_add(a, R::load_first(sources[i] + whole, columns - whole), acc[i]);
            }
            S::store_first(args.dots + s, sum_some<offpath::Sum<T>>(acc), count);
        }
    }
}

} // namespace
