// Transposes through squares of registers: every cache line is read and written whole.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// destination[c, r] = source[r, c] for rows, columns <= lanes; of each destination row the first `written` entries
// are written, and rows that the source lacks read as zero.
// log2(lanes) rounds of perfect shuffles transpose a square of registers.
template <class T>
void transpose_square(const T *source, int64_t source_stride, int64_t rows, int64_t columns, T *destination,
                      int64_t destination_stride, int64_t written) {
    using S = Simd<T>;
    constexpr int lanes = S::lanes;
    typename S::V a[lanes], b[lanes];
    for (int r = 0; r < lanes; ++r)
        a[r] = r < rows ? S::load_first(source + r * source_stride, columns) : S::zero();
    for (int round = 1; round < lanes; round *= 2) {
        for (int i = 0; i < lanes / 2; ++i) {
            b[2 * i] = S::interleave_low(a[i], a[i + lanes / 2]);
            b[2 * i + 1] = S::interleave_high(a[i], a[i + lanes / 2]);
        }
        for (int i = 0; i < lanes; ++i)
            a[i] = b[i];
    }
    for (int c = 0; c < columns; ++c)
        S::store_first(destination + c * destination_stride, a[c], written);
}

template <class T> void transpose(const offpath::transpose_args<T> &args, const offpath::Block &block) {
    constexpr int64_t lanes = Simd<T>::lanes;
    for (int64_t r = block.row_begin; r < block.row_end; r += lanes)
        for (int64_t c = block.batch_begin; c < block.batch_end; c += lanes) {
            const int64_t rows = block.row_end - r < lanes ? block.row_end - r : lanes;
            const int64_t columns = block.batch_end - c < lanes ? block.batch_end - c : lanes;
            transpose_square(args.source + r * args.source_stride + c, args.source_stride, rows, columns,
                             args.destination + c * args.destination_stride + r, args.destination_stride, rows);
        }
}

} // namespace
