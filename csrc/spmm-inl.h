// Row-wise sparse x dense: for one row of the sparse matrix, a strip of the batch stays in `vectors` registers
// while the row's connections are added to it in ascending column order.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

template <class T, int vectors>
void spmm_strip(const offpath::spmm_args<T> &args, const offpath::Block &block, int64_t b) {
    using S = Simd<T>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        typename S::V acc[vectors];
        const typename S::V start = args.bias ? S::set1(args.bias[row]) : S::zero();
        for (int v = 0; v < vectors; ++v)
            acc[v] = start;
        const int64_t end = args.csr.crow_indices[row + 1];
        for (int64_t s = args.csr.crow_indices[row]; s < end; ++s) {
            const T *x = args.x + args.csr.col_indices[s] * args.x_stride + b;
            const typename S::V value = S::set1(args.values[s]);
            for (int v = 0; v < vectors; ++v)
                acc[v] = S::fma(value, S::load(x + v * S::lanes), acc[v]);
        }
        T *y = args.y + row * args.y_stride + b;
        for (int v = 0; v < vectors; ++v)
            S::store(y + v * S::lanes, acc[v]);
    }
}

// The last n < lanes columns of the batch.
template <class T>
void spmm_tail(const offpath::spmm_args<T> &args, const offpath::Block &block, int64_t b, int64_t n) {
    using S = Simd<T>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        typename S::V acc = args.bias ? S::set1(args.bias[row]) : S::zero();
        const int64_t end = args.csr.crow_indices[row + 1];
        for (int64_t s = args.csr.crow_indices[row]; s < end; ++s) {
            const T *x = args.x + args.csr.col_indices[s] * args.x_stride + b;
            acc = S::fma(S::set1(args.values[s]), S::load_first(x, n), acc);
        }
        S::store_first(args.y + row * args.y_stride + b, acc, n);
    }
}

template <class T> void spmm(const offpath::spmm_args<T> &args, const offpath::Block &block) {
    constexpr int64_t lanes = Simd<T>::lanes;
    int64_t b = block.batch_begin;
    for (; block.batch_end - b >= 8 * lanes; b += 8 * lanes)
        spmm_strip<T, 8>(args, block, b);
    for (; block.batch_end - b >= 4 * lanes; b += 4 * lanes)
        spmm_strip<T, 4>(args, block, b);
    for (; block.batch_end - b >= 2 * lanes; b += 2 * lanes)
        spmm_strip<T, 2>(args, block, b);
    for (; block.batch_end - b >= lanes; b += lanes)
        spmm_strip<T, 1>(args, block, b);
    if (b < block.batch_end)
        spmm_tail<T>(args, block, b, block.batch_end - b);
}

} // namespace
