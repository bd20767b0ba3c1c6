// The products on sparse rows: what the entries name is read, and nothing else.
#pragma once

#include "layout-inl.h"
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

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct RowVector<bfloat16> {
    static constexpr int64_t entries = BfloatPairs::entries;
    using S = Simd<float>;
    using V = BfloatPairs::V;
    static V load(const bfloat16 *p) { return BfloatPairs::load(p); }
    static V load_first(const bfloat16 *p, int64_t n) { return BfloatPairs::load_first(p, n); }
    static Simd<float>::V multiply_add(V a, V b, Simd<float>::V sum) { return BfloatPairs::dot(a, b, sum); }
};
#endif

// While an entry's row of the weight is read, the row of one so many entries later is fetched: they lie anywhere in
// memory, and the processor cannot know where.
constexpr int64_t entries_ahead = 4;

template <class T> [[gnu::always_inline]] inline void fetch(const T *p) { __builtin_prefetch(p); }

// Some registers full of neighbouring columns of a row of y, to which entries are added one by one; of a single
// register only the first `n` columns may count.
template <class T, int vectors> struct RowSums {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int64_t columns = S::lanes; // of a register of the weight
    static constexpr int64_t entries = 1;        // that are added at a time
    typename S::V sums[vectors];

    [[gnu::always_inline]] void start(const T *y, int64_t n) {
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v)
            sums[v] = y ? RowVector<T>::load_first(y + v * columns, n) : S::zero();
    }
    [[gnu::always_inline]] void add(const T *values, const T *row, const T *, int64_t n, const T *next, const T *) {
        const typename S::V value = S::set1(compute(*values));
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v) {
            fetch(next + v * columns);
            sums[v] = S::fma(value, RowVector<T>::load_first(row + v * columns, n), sums[v]);
        }
    }
    [[gnu::always_inline]] void finish(T *y, int64_t n) {
#pragma GCC unroll 32
        for (int v = 0; v < vectors; ++v)
            if constexpr (sizeof(T) == sizeof(offpath::Sum<T>) && vectors > 1)
                S::store(y + v * columns, sums[v]);
            else
                S::store_first(y + v * columns, sums[v], n);
    }
};

#ifdef OFFPATH_BFLOAT_PAIRS
// Two entries at a time: their rows are zipped, so that one instruction multiplies a column of both.
template <int vectors> struct RowSums<bfloat16, vectors> {
    using B = BfloatPairs;
    using S = Simd<float>;
    static constexpr int64_t columns = B::entries, entries = 2;
    S::V low[vectors], high[vectors];

    [[gnu::always_inline]] static int64_t low_lanes(int64_t n) { return n < S::lanes ? n : S::lanes; }
    [[gnu::always_inline]] void start(const bfloat16 *y, int64_t n) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            low[v] = high[v] = S::zero();
            if (y) {
                const S::V first = S::load_first(y + v * columns, low_lanes(n));
                const S::V second = S::load_first(y + v * columns + S::lanes, n - low_lanes(n));
                low[v] = B::rezip_low(first, second);
                high[v] = B::rezip_high(first, second);
            }
        }
    }
    // Without a partner a row meets zeros, not what lies in some other row: zero times infinity is NaN.
    [[gnu::always_inline]] void add(const bfloat16 *values, const bfloat16 *row, const bfloat16 *partner, int64_t n,
                                    const bfloat16 *next, const bfloat16 *next_partner) {
        const B::V pair = B::set1(values[0].bits | (partner ? uint32_t{values[1].bits} << 16 : 0));
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            fetch(next + v * columns);
            fetch(next_partner + v * columns);
            const B::V a = RowVector<bfloat16>::load_first(row + v * columns, n);
            const B::V b = partner ? RowVector<bfloat16>::load_first(partner + v * columns, n) : B::zero();
            low[v] = B::dot(pair, B::zip_low(a, b), low[v]);
            high[v] = B::dot(pair, B::zip_high(a, b), high[v]);
        }
    }
    [[gnu::always_inline]] void finish(bfloat16 *y, int64_t n) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            S::store_first(y + v * columns, B::unzip_low(low[v], high[v]), low_lanes(n));
            S::store_first(y + v * columns + S::lanes, B::unzip_high(low[v], high[v]), n - low_lanes(n));
        }
    }
};
#endif

// `vectors` registers of one row of y.
template <class T, int vectors>
[[gnu::always_inline]] inline void sum_row(const offpath::rows_matmul_args<T> &args, int64_t row, int64_t column,
                                           int64_t n) {
    using R = RowSums<T, vectors>;
    const int64_t begin = args.entries.crow_indices[row], end = args.entries.crow_indices[row + 1];
    const int64_t last = args.entries.crow_indices[args.entries.rows] - 1;
    const T *weight = args.weight.data + column;
    const auto row_of = [&](int64_t s) { return weight + args.entries.col_indices[s] * args.weight.stride; };
    const auto ahead = [&](int64_t s) { return row_of(s + entries_ahead < last ? s + entries_ahead : last); };
    T *y = args.y.data + row * args.y.stride + column;
    R sums;
    sums.start(args.add ? y : nullptr, n);
    int64_t s = begin;
    for (; s + R::entries <= end; s += R::entries)
        sums.add(args.values + s, row_of(s), row_of(s + R::entries - 1), n, ahead(s), ahead(s + 1));
    if (s < end)
        sums.add(args.values + s, row_of(s), nullptr, n, ahead(s), ahead(s + 1));
    sums.finish(y, n);
}

// All columns from `column` to `end`, as wide as the registers allow.
template <class T, int vectors>
[[gnu::always_inline]] inline void sum_columns(const offpath::rows_matmul_args<T> &args, int64_t row, int64_t column,
                                               int64_t end) {
    constexpr int64_t columns = RowSums<T, vectors>::columns;
    for (; column + vectors * columns <= end; column += vectors * columns)
        sum_row<T, vectors>(args, row, column, columns);
    if constexpr (vectors > 1)
        sum_columns<T, vectors / 2>(args, row, column, end);
    else if (column < end)
        sum_row<T, 1>(args, row, column, end - column);
}

// Block: rows are rows of y, batch its columns.
template <class T> void rows_matmul(const offpath::rows_matmul_args<T> &args, const offpath::Block &block) {
    // As many registers of sums as an ISA has beside what is multiplied.
    constexpr int registers = panel_vectors * 6,
                  vectors = registers * Simd<offpath::Sum<T>>::lanes / RowSums<T, 1>::columns;
    for (int64_t row = block.row_begin; row < block.row_end; ++row)
        if (!args.add || args.entries.crow_indices[row] < args.entries.crow_indices[row + 1])
            sum_columns<T, vectors>(args, row, block.batch_begin, block.batch_end);
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
