// Sampled dense x dense: one dot product over the batch per connection. Several connections of a row share the
// loads of dy, and a register full of connections is reduced at once. A connection's order of summation does not
// depend on which connections it is computed with, nor on how the rows are split over threads.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// Long enough to hide the reduction at its end, short enough that the rows of x it touches stay in cache.
constexpr int64_t sddmm_batch_block = 2048;

// totals[c] = the lanewise sums of the dot product of connection s + c over the batch from `begin` to `end`.
template <class T, int connections>
void sddmm_dots(const offpath::sddmm_args<T> &args, const T *dy, int64_t s, int64_t begin, int64_t end,
                typename Simd<T>::V *totals) {
    using S = Simd<T>;
    const T *x[connections];
    typename S::V acc[connections];
#pragma GCC unroll 8
    for (int c = 0; c < connections; ++c) {
        x[c] = args.x + args.csr.col_indices[s + c] * args.x_stride;
        acc[c] = S::zero();
    }
    int64_t b = begin;
    for (; end - b >= S::lanes; b += S::lanes) {
        const typename S::V dy_now = S::load(dy + b);
#pragma GCC unroll 8
        for (int c = 0; c < connections; ++c)
            acc[c] = S::fma(dy_now, S::load(x[c] + b), acc[c]);
    }
    if (b < end) {
        const typename S::V dy_last = S::load_first(dy + b, end - b);
        for (int c = 0; c < connections; ++c)
            acc[c] = S::fma(dy_last, S::load_first(x[c] + b, end - b), acc[c]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < connections; ++c)
        totals[c] = acc[c];
}

// At most `lanes` connections of one row.
template <class T>
void sddmm_connections(const offpath::sddmm_args<T> &args, const T *dy, int64_t s, int64_t n, int64_t begin,
                       int64_t end) {
    using S = Simd<T>;
    typename S::V totals[S::lanes];
    int64_t c = 0;
    for (; n - c >= 8; c += 8)
        sddmm_dots<T, 8>(args, dy, s + c, begin, end, totals + c);
    for (; n - c >= 4; c += 4)
        sddmm_dots<T, 4>(args, dy, s + c, begin, end, totals + c);
    for (; c < n; ++c)
        sddmm_dots<T, 1>(args, dy, s + c, begin, end, totals + c);
    for (; c < S::lanes; ++c)
        totals[c] = S::zero();
    typename S::V sums = sum_each<T>(totals);
    if (begin > 0)
        sums = S::add(sums, S::load_first(args.dvalues + s, n));
    S::store_first(args.dvalues + s, sums, n);
}

template <class T> void sddmm(const offpath::sddmm_args<T> &args, const offpath::Block &block) {
    constexpr int64_t lanes = Simd<T>::lanes;
    int64_t begin = block.batch_begin;
    do { // at least once: an empty batch has gradient zero, not stale memory
        const int64_t end = block.batch_end - begin < sddmm_batch_block ? block.batch_end : begin + sddmm_batch_block;
        for (int64_t row = block.row_begin; row < block.row_end; ++row) {
            const int64_t row_end = args.csr.crow_indices[row + 1];
            for (int64_t s = args.csr.crow_indices[row]; s < row_end; s += lanes)
                sddmm_connections(args, args.dy + row * args.dy_stride, s, row_end - s < lanes ? row_end - s : lanes,
                                  begin, end);
        }
        begin = end;
    } while (begin < block.batch_end);
}

} // namespace
