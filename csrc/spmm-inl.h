// Row-wise sparse x dense: for a row of the sparse matrix, a strip of the batch stays in `vectors` registers while the
// row's connections are added to it in ascending column order.
#pragma once

#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

// Rows whose sums are computed together, so that no addition waits for the one before it; many registers of tokens are
// enough additions by themselves.
template <int vectors> constexpr int rows_together = vectors <= 2 ? 4 : 1;
// Neighbours of each of them that are finished in a small tile before they are written to y: whole squares of the
// transpose, on every ISA.
constexpr int64_t spmm_tile_rows = 16;
// Connections that are added before those of `spmm_prefetched_bytes` later are fetched: a cache line of columns.
constexpr int64_t connections_per_fetch = 64 / sizeof(int32_t), spmm_prefetched_bytes = 512;

// Some rows that lie `apart`, and one strip of the batch. Neighbours would each be followed in memory by one that is
// read at the same time; so each goes on with the row that is read next, and neither fetching ahead nor the processor's
// own is in vain.
template <class T, int vectors> struct RowsTogether {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int rows = rows_together<vectors>;
    typename S::V sums[rows][vectors];
    const T *values[rows];
    const int32_t *columns[rows];
    int64_t counts[rows], row[rows];

    // The longest row comes first; what `end` leaves over of the last rows has no connections.
    RowsTogether(const offpath::spmm_args<T> &args, int64_t first, int64_t apart, int64_t end) {
        for (int i = 0; i < rows; ++i) {
            row[i] = first + i * apart;
            counts[i] = row[i] < end ? args.csr.crow_indices[row[i] + 1] - args.csr.crow_indices[row[i]] : 0;
        }
        for (int last = rows - 1; last > 0; --last)
#pragma GCC unroll 4
            for (int i = 0; i < last; ++i)
                longer_first(i, i + 1);
        for (int i = 0; i < rows; ++i) {
            const int64_t r = row[i] < end ? row[i] : first;
            values[i] = args.values + args.csr.crow_indices[r];
            columns[i] = args.csr.col_indices + args.csr.crow_indices[r];
            const typename S::V start = args.bias ? S::set1(compute(args.bias[r])) : S::zero();
            for (int v = 0; v < vectors; ++v)
                sums[i][v] = start;
        }
    }
    // Without a branch: which of two rows is longer is a coin toss for the predictor.
    [[gnu::always_inline]] void longer_first(int a, int b) {
        const bool swap = counts[a] < counts[b];
        const int64_t count = swap ? counts[b] : counts[a], r = swap ? row[b] : row[a];
        counts[b] = swap ? counts[a] : counts[b];
        row[b] = swap ? row[a] : row[b];
        counts[a] = count;
        row[a] = r;
    }
    // Adds the connections from `begin` on: the first n rows until one of them ends, then one row less. Which sum is
    // meant must be known to the compiler, or it keeps them in memory.
    template <int n> [[gnu::always_inline]] void add(const offpath::Sum<T> *x, int64_t x_stride, int64_t begin) {
        int64_t s = begin;
        if constexpr (n == rows)
            for (; counts[n - 1] - s >= connections_per_fetch; s += connections_per_fetch) {
                fetch_ahead(s);
                add_between<n>(x, x_stride, s, s + connections_per_fetch);
            }
        add_between<n>(x, x_stride, s, counts[n - 1]);
        if constexpr (n > 1)
            add<n - 1>(x, x_stride, counts[n - 1]);
    }

  private:
    template <int n>
    [[gnu::always_inline]] void add_between(const offpath::Sum<T> *x, int64_t x_stride, int64_t begin, int64_t end) {
#pragma GCC unroll 1
        for (int64_t s = begin; s < end; ++s)
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
                const offpath::Sum<T> *column = x + columns[i][s] * x_stride;
                const typename S::V value = S::set1(compute(values[i][s]));
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    sums[i][v] = S::fma(value, S::load(column + v * S::lanes), sums[i][v]);
            }
    }
    [[gnu::always_inline]] void fetch_ahead(int64_t s) const {
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
            __builtin_prefetch(columns[i] + s + spmm_prefetched_bytes / sizeof(int32_t));
            const T *value = values[i] + s + spmm_prefetched_bytes / sizeof(T);
#pragma GCC unroll 2
            for (int64_t line = 0; line < connections_per_fetch; line += 64 / sizeof(T))
                __builtin_prefetch(value + line);
        }
    }
};

template <class T, int vectors>
void spmm_strip(const offpath::spmm_args<T> &args, const offpath::Block &block, int64_t token) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int64_t lanes = S::lanes, width = vectors * lanes;
    const int64_t tokens = args.batch - token < width ? args.batch - token : width;
    constexpr int at_once = rows_together<vectors>;
    constexpr int64_t rows_of_tile = at_once * spmm_tile_rows;
    alignas(64) offpath::Sum<T> tile[rows_of_tile * width];
    for (int64_t first = block.row_begin; first < block.row_end; first += rows_of_tile) {
        const int64_t end = block.row_end - first < rows_of_tile ? block.row_end : first + rows_of_tile;
        const int64_t apart = (end - first + at_once - 1) / at_once;
        for (int64_t r = first; r < first + apart; ++r) {
            RowsTogether<T, vectors> together(args, r, apart, end);
            together.template add<at_once>(args.x + token, args.x_stride, 0);
#pragma GCC unroll 4
            for (int i = 0; i < at_once; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    S::store(tile + (together.row[i] - first) * width + v * lanes, together.sums[i][v]);
        }
        for (int64_t t = 0; t < tokens; t += lanes)
            for (int64_t r = first; r < end; r += lanes) {
                const int64_t rows = end - r < lanes ? end - r : lanes;
                transpose_square<T>(tile + (r - first) * width + t, width, rows,
                                    tokens - t < lanes ? tokens - t : lanes, args.y + (token + t) * args.csr.rows + r,
                                    args.csr.rows, rows);
            }
    }
}

// One token whose features stand side by side: a register of connections takes its inputs from where they are. Fetching
// them takes longer than an addition, so one sum a row is enough.
template <class T> void spmm_one_token(const offpath::spmm_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        typename S::V acc[summed_together<offpath::Sum<T>>];
        for (auto &sum : acc)
            sum = S::zero();
        const int64_t end = args.csr.crow_indices[row + 1];
        int64_t s = args.csr.crow_indices[row];
        for (; end - s >= S::lanes; s += S::lanes) {
            __builtin_prefetch(args.values + s + prefetched_bytes / sizeof(T));
            __builtin_prefetch(args.csr.col_indices + s + prefetched_bytes / sizeof(int32_t));
            acc[0] =
                S::fma(S::load_first(args.values + s, S::lanes), S::load_at(args.x, args.csr.col_indices + s), acc[0]);
        }
        acc[1] = S::fma(S::load_first(args.values + s, end - s),
                        S::load_first_at(args.x, args.csr.col_indices + s, end - s), acc[1]);
        const typename S::V bias = S::set1(args.bias ? compute(args.bias[row]) : 0);
        acc[0] = S::add(acc[0], acc[1]);
        acc[1] = S::zero();
        S::store_first(args.y + row, S::add(sum_some<offpath::Sum<T>>(acc), bias), 1);
    }
}

template <class T> void spmm(const offpath::spmm_args<T> &args, const offpath::Block &block) {
    constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes;
    if (args.batch == 1 && args.x_stride == 1)
        return spmm_one_token<T>(args, block);
    const auto vectors_from = [&](int64_t token) { return (block.batch_end - token + lanes - 1) / lanes; };
    int64_t token = block.batch_begin;
    for (; vectors_from(token) >= 8; token += 8 * lanes)
        spmm_strip<T, 8>(args, block, token);
    for (; vectors_from(token) >= 4; token += 4 * lanes)
        spmm_strip<T, 4>(args, block, token);
    for (; vectors_from(token) >= 2; token += 2 * lanes)
        spmm_strip<T, 2>(args, block, token);
    if (vectors_from(token) > 0)
        spmm_strip<T, 1>(args, block, token);
}

} // namespace
