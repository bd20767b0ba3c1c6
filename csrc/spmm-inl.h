// Row-wise sparse x dense: for one row of the sparse matrix, a strip of the batch stays in `vectors` registers
// while the row's connections are added to it in ascending column order.
#pragma once

#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

template <class T, int vectors>
void spmm_strip(const offpath::spmm_args<T> &args, const offpath::Block &block, int64_t b) {
    using S = Simd<offpath::Sum<T>>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        typename S::V acc[vectors];
        const typename S::V start = args.bias ? S::set1(compute(args.bias[row])) : S::zero();
        for (int v = 0; v < vectors; ++v)
            acc[v] = start;
        const int64_t end = args.csr.crow_indices[row + 1];
        for (int64_t s = args.csr.crow_indices[row]; s < end; ++s) {
            const offpath::Sum<T> *x = args.x + args.csr.col_indices[s] * args.x_stride + b;
            const typename S::V value = S::set1(compute(args.values[s]));
            for (int v = 0; v < vectors; ++v)
                acc[v] = S::fma(value, S::load(x + v * S::lanes), acc[v]);
        }
        offpath::Sum<T> *y = args.y + row * args.y_stride + b;
        for (int v = 0; v < vectors; ++v)
            S::store(y + v * S::lanes, acc[v]);
    }
}

// The last n <= lanes columns of the batch. Four rows take turns, so that no addition waits for the one before it.
template <class T>
void spmm_tail(const offpath::spmm_args<T> &args, const offpath::Block &block, int64_t b, int64_t n) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int together = 4;
    const auto add = [&](typename S::V acc, int64_t s) {
        const offpath::Sum<T> *x = args.x + args.csr.col_indices[s] * args.x_stride + b;
        return S::fma(S::set1(compute(args.values[s])), S::load_first(x, n), acc);
    };
    for (int64_t first = block.row_begin; first < block.row_end; first += together) {
        const int rows = block.row_end - first < together ? static_cast<int>(block.row_end - first) : together;
        typename S::V acc[together];
        int64_t next[together] = {}, shortest = rows == together ? INT32_MAX : 0;
        for (int i = 0; i < rows; ++i) {
            acc[i] = args.bias ? S::set1(compute(args.bias[first + i])) : S::zero();
            next[i] = args.csr.crow_indices[first + i];
            const int64_t count = args.csr.crow_indices[first + i + 1] - next[i];
            shortest = count < shortest ? count : shortest;
        }
        for (int64_t k = 0; k < shortest; ++k)
#pragma GCC unroll 4
            for (int i = 0; i < together; ++i)
                acc[i] = add(acc[i], next[i] + k);
        for (int i = 0; i < rows; ++i) {
            for (int64_t s = next[i] + shortest; s < args.csr.crow_indices[first + i + 1]; ++s)
                acc[i] = add(acc[i], s);
            S::store_first(args.y + (first + i) * args.y_stride + b, acc[i], n);
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
        S::store_first(args.y + row * args.y_stride, S::add(sum_some<offpath::Sum<T>>(acc), bias), 1);
    }
}

template <class T> void spmm(const offpath::spmm_args<T> &args, const offpath::Block &block) {
    constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes;
    int64_t b = block.batch_begin;
    if (args.batch == 1 && args.x_stride == 1)
        return spmm_one_token<T>(args, block);
    for (; block.batch_end - b >= 8 * lanes; b += 8 * lanes)
        spmm_strip<T, 8>(args, block, b);
    for (; block.batch_end - b >= 4 * lanes; b += 4 * lanes)
        spmm_strip<T, 4>(args, block, b);
    for (; block.batch_end - b >= 2 * lanes; b += 2 * lanes)
        spmm_strip<T, 2>(args, block, b);
    for (; b < block.batch_end; b += lanes)
        spmm_tail<T>(args, block, b, block.batch_end - b < lanes ? block.batch_end - b : lanes);
}

} // namespace
