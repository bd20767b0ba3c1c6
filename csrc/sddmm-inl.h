// Sampled dense x dense: one dot product over the batch per connection. Several connections of a row share the
// loads of dy. A connection's order of summation does not depend on which connections it is computed with, nor on
// how the rows are split over threads.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// Long enough to hide the reduction at its end, short enough that the rows of x it touches stay in cache.
constexpr int64_t sddmm_batch_block = 2048;

template <class T, int connections>
void sddmm_dots(const offpath::sddmm_args<T> &args, const T *dy, int64_t s, int64_t begin, int64_t end) {
    using S = Simd<T>;
    const T *x[connections];
    typename S::V even[connections], odd[connections];
    for (int c = 0; c < connections; ++c) {
        x[c] = args.x + args.csr.col_indices[s + c] * args.x_stride;
        even[c] = odd[c] = S::zero();
    }
    int64_t b = begin;
    for (; end - b >= 2 * S::lanes; b += 2 * S::lanes) {
        const typename S::V dy_even = S::load(dy + b), dy_odd = S::load(dy + b + S::lanes);
        for (int c = 0; c < connections; ++c) {
            even[c] = S::fma(dy_even, S::load(x[c] + b), even[c]);
            odd[c] = S::fma(dy_odd, S::load(x[c] + b + S::lanes), odd[c]);
        }
    }
    for (; b < end; b += S::lanes) {
        const int64_t n = end - b < S::lanes ? end - b : S::lanes;
        const typename S::V dy_last = S::load_first(dy + b, n);
        for (int c = 0; c < connections; ++c)
            even[c] = S::fma(dy_last, S::load_first(x[c] + b, n), even[c]);
    }
    for (int c = 0; c < connections; ++c) {
        const T dot = sum<T>(even[c] + odd[c]);
        args.dvalues[s + c] = begin == 0 ? dot : args.dvalues[s + c] + dot;
    }
}

template <class T> void sddmm(const offpath::sddmm_args<T> &args, const offpath::Block &block) {
    int64_t begin = block.batch_begin;
    do { // at least once: an empty batch has gradient zero, not stale memory
        const int64_t end = block.batch_end - begin < sddmm_batch_block ? block.batch_end : begin + sddmm_batch_block;
        for (int64_t row = block.row_begin; row < block.row_end; ++row) {
            const T *dy = args.dy + row * args.dy_stride;
            int64_t s = args.csr.crow_indices[row];
            const int64_t row_end = args.csr.crow_indices[row + 1];
            for (; row_end - s >= 4; s += 4)
                sddmm_dots<T, 4>(args, dy, s, begin, end);
            for (; s < row_end; ++s)
                sddmm_dots<T, 1>(args, dy, s, begin, end);
        }
        begin = end;
    } while (begin < block.batch_end);
}

} // namespace
