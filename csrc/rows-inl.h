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

// How many entries ahead the rows of the weight are fetched: they lie anywhere in memory.
constexpr int64_t entries_ahead = 6;

template <class T> [[gnu::always_inline]] inline void prefetch_row(const T *row, int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += line)
        __builtin_prefetch(row + i);
}

// One row of y, `vectors` registers of it (the last of them `tail` lanes), single entries.
template <class T, int vectors>
[[gnu::always_inline]] inline void sum_entries(const offpath::rows_matmul_args<T> &args, int64_t row, int64_t column,
                                               int64_t count) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int64_t lanes = S::lanes;
    const int64_t begin = args.entries.crow_indices[row], end = args.entries.crow_indices[row + 1];
    const int64_t nnz = args.entries.crow_indices[args.entries.rows];
    const int64_t tail = count - (vectors - 1) * lanes;
    T *y = args.y.data + row * args.y.stride + column;
    const auto load = [&](const T *p, int v) {
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>))
            return v + 1 < vectors || tail == lanes ? S::load(p + v * lanes) : S::load_first(p + v * lanes, tail);
        else
            return S::load_first(p + v * lanes, v + 1 < vectors ? lanes : tail);
    };
    typename S::V acc[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        acc[v] = args.add ? load(y, v) : S::zero();
    for (int64_t s = begin; s < end; ++s) {
        if (s + entries_ahead < nnz)
            prefetch_row(args.weight.data + args.entries.col_indices[s + entries_ahead] * args.weight.stride + column,
                         count);
        const T *source = args.weight.data + args.entries.col_indices[s] * args.weight.stride + column;
        const typename S::V value = S::set1(compute(args.values[s]));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[v] = S::fma(value, load(source, v), acc[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>)) {
            if (v + 1 < vectors || tail == lanes)
                S::store(y + v * lanes, acc[v]);
            else
                S::store_first(y + v * lanes, acc[v], tail);
        } else {
            S::store_first(y + v * lanes, acc[v], v + 1 < vectors ? lanes : tail);
        }
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
// Two entries at a time: their rows are zipped, so that one instruction multiplies a column of both.
template <int pairs_of_vectors>
[[gnu::always_inline]] inline void sum_pairs(const offpath::rows_matmul_args<bfloat16> &args, int64_t row,
                                             int64_t column, int64_t count) {
    using B = BfloatPairs;
    using S = Simd<float>;
    const int64_t begin = args.entries.crow_indices[row], end = args.entries.crow_indices[row + 1];
    const int64_t nnz = args.entries.crow_indices[args.entries.rows];
    const int64_t tail = count - (pairs_of_vectors - 1) * B::entries;
    bfloat16 *y = args.y.data + row * args.y.stride + column;
    const auto load = [&](const bfloat16 *p, int v) {
        return v + 1 < pairs_of_vectors ? B::load(p + v * B::entries) : B::load_first(p + v * B::entries, tail);
    };
    const auto row_of = [&](int64_t s) {
        return args.weight.data + args.entries.col_indices[s] * args.weight.stride + column;
    };
    __m512 acc[2 * pairs_of_vectors];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * pairs_of_vectors; ++v)
        acc[v] = S::zero();
    for (int64_t s = begin; s < end; s += 2) {
        for (int64_t ahead = s + entries_ahead; ahead < s + entries_ahead + 2 && ahead < nnz; ++ahead)
            prefetch_row(row_of(ahead), count);
        const bfloat16 *first = row_of(s);
        const bool paired = s + 1 < end;
        const bfloat16 *second = paired ? row_of(s + 1) : first;
        const B::V values = B::set1(args.values[s].bits | (paired ? uint32_t{args.values[s + 1].bits} << 16 : 0));
#pragma GCC unroll 4
        for (int v = 0; v < pairs_of_vectors; ++v) {
            const B::V a = load(first, v), b = paired ? load(second, v) : B::zero();
            acc[2 * v] = B::dot(values, B::zip_low(a, b), acc[2 * v]);
            acc[2 * v + 1] = B::dot(values, B::zip_high(a, b), acc[2 * v + 1]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < pairs_of_vectors; ++v) {
        const int64_t n = v + 1 < pairs_of_vectors ? B::entries : tail;
        const int64_t n_low = n < S::lanes ? n : S::lanes, n_high = n - n_low;
        bfloat16 *to = y + v * B::entries;
        __m512 low = B::unzip_low(acc[2 * v], acc[2 * v + 1]), high = B::unzip_high(acc[2 * v], acc[2 * v + 1]);
        if (args.add) {
            low = S::add(low, S::load_first(to, n_low));
            high = S::add(high, S::load_first(to + S::lanes, n_high));
        }
        S::store_first(to, low, n_low);
        S::store_first(to + S::lanes, high, n_high);
    }
}
#endif

// Registers of sums: enough to keep the multipliers busy, few enough for every ISA.
constexpr int row_vectors = 8;

template <class T, int vectors>
[[gnu::always_inline]] inline void sum_row(const offpath::rows_matmul_args<T> &args, int64_t row, int64_t column,
                                           int64_t count) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (sizeof(T) == 2)
        return sum_pairs<vectors>(args, row, column, count);
    else
#endif
        sum_entries<T, vectors>(args, row, column, count);
}

// As much of a row as `vectors` registers hold, in as few pieces as possible; only a single register may be partly
// full.
template <class T, int vectors>
[[gnu::always_inline]] inline void sum_pieces(const offpath::rows_matmul_args<T> &args, int64_t row, int64_t column,
                                              int64_t count) {
    constexpr int64_t size = vectors * RowVector<T>::entries;
    if (count >= size || (vectors == 1 && count > 0)) {
        const int64_t done = count < size ? count : size;
        sum_row<T, vectors>(args, row, column, done);
        column += done;
        count -= done;
    }
    if constexpr (vectors > 1)
        sum_pieces<T, vectors / 2>(args, row, column, count);
    else if (count > 0)
        sum_row<T, 1>(args, row, column, count);
}

// Block: rows are rows of y, batch its columns.
template <class T> void rows_matmul(const offpath::rows_matmul_args<T> &args, const offpath::Block &block) {
    constexpr int64_t entries = RowVector<T>::entries;
    constexpr int most = row_vectors * Simd<offpath::Sum<T>>::lanes / entries;
    for (int64_t column = block.batch_begin; column < block.batch_end; column += most * entries) {
        const int64_t left = block.batch_end - column, count = left < most * entries ? left : most * entries;
        for (int64_t row = block.row_begin; row < block.row_end; ++row)
            if (!args.add || args.entries.crow_indices[row] < args.entries.crow_indices[row + 1])
                sum_pieces<T, most>(args, row, column, count);
    }
}

// Block: rows are rows of dy, batch columns.
template <class T> void rows_dots(const offpath::rows_dots_args<T> &args, const offpath::Block &block) {
    using R = RowVector<T>;
    using S = typename R::S;
    constexpr int together = summed_together<offpath::Sum<T>>;
    const int64_t columns = block.batch_end - block.batch_begin, whole = columns / R::entries * R::entries;
    const int64_t nnz = args.entries.crow_indices[args.entries.rows];
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const T *dy = args.dy.data + row * args.dy.stride + block.batch_begin;
        const int64_t end = args.entries.crow_indices[row + 1];
        for (int64_t s = args.entries.crow_indices[row]; s < end; s += together) {
            const int64_t count = end - s < together ? end - s : together;
            const T *sources[together];
            typename S::V acc[together];
            for (int i = 0; i < together; ++i) {
                const int64_t entry = s + (i < count ? i : 0);
                sources[i] =
                    args.weight.data + args.entries.col_indices[entry] * args.weight.stride + block.batch_begin;
                acc[i] = S::zero();
                if (const int64_t ahead = s + together + i; ahead < nnz)
                    prefetch_row(args.weight.data + args.entries.col_indices[ahead] * args.weight.stride +
                                     block.batch_begin,
                                 columns < 512 / static_cast<int64_t>(sizeof(T)) ? columns : 512 / sizeof(T));
            }
            for (int64_t c = 0; c < whole; c += R::entries) {
                const typename R::V a = R::load(dy + c);
#pragma GCC unroll 4
                for (int i = 0; i < together; ++i)
                    acc[i] = R::multiply_add(a, R::load(sources[i] + c), acc[i]);
            }
            if (whole < columns) {
                const typename R::V a = R::load_first(dy + whole, columns - whole);
                for (int i = 0; i < together; ++i)
                    acc[i] = R::multiply_add(a, R::load_first(sources[i] + whole, columns - whole), acc[i]);
            }
            typename S::V sums = sum_some<offpath::Sum<T>>(acc);
            if (block.batch_begin > 0)
                sums = S::add(sums, S::load_first(args.sums + s, count));
            if (block.batch_end == args.width)
                S::store_first(args.dots + s, sums, count);
            else
                S::store_first(args.sums + s, sums, count);
        }
    }
}

} // namespace
