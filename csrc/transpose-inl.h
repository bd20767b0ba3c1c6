// Transposes through squares of registers: every cache line is read and written whole.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// log2(lanes) rounds of perfect shuffles transpose a square of registers.
template <class S> [[gnu::always_inline]] inline void transpose_registers(typename S::V (&a)[S::lanes]) {
    typename S::V b[S::lanes];
#pragma GCC unroll 4
    for (int round = 1; round < S::lanes; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < S::lanes / 2; ++i) {
            b[2 * i] = S::interleave_low(a[i], a[i + S::lanes / 2]);
            b[2 * i + 1] = S::interleave_high(a[i], a[i + S::lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < S::lanes; ++i)
            a[i] = b[i];
    }
}

// `p`, after asking for what its row goes on with. Squares go through a register's width of rows at once, which lie far
// apart: more streams than a processor sees by itself, so that activations in memory would be waited for line by line.
template <class T> [[gnu::always_inline]] inline const T *fetched_ahead(const T *p) {
    constexpr int64_t bytes_ahead = 128;
    __builtin_prefetch(p + bytes_ahead / sizeof(T));
    return p;
}

// destination[c, r] = source[r, c] for rows, columns <= lanes; of each destination row the first `written` entries
// are written, and rows that the source lacks read as zero. From and To may differ: one of them is what T is kept in.
template <class T, class From, class To>
void transpose_square(const From *source, int64_t source_stride, int64_t rows, int64_t columns, To *destination,
                      int64_t destination_stride, int64_t written) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int lanes = S::lanes;
    typename S::V a[lanes];
    for (int r = 0; r < lanes; ++r)
        a[r] = r < rows ? S::load_first(fetched_ahead(source + r * source_stride), columns) : S::zero();
    transpose_registers<S>(a);
    for (int c = 0; c < columns; ++c)
        S::store_first(destination + c * destination_stride, a[c], written);
}

// The block's rows are those of the source: all of them. Whole registers are written, as far as they belong to the row.
template <class T> void to_features(const offpath::to_features_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int64_t lanes = S::lanes;
    for (int64_t r = block.row_begin; r < args.destination_stride; r += lanes) {
        const int64_t left = block.row_end > r ? block.row_end - r : 0, rows = left < lanes ? left : lanes;
        const int64_t written = args.destination_stride - r < lanes ? args.destination_stride - r : lanes;
        if (args.source_column_stride == 1)
            for (int64_t c = block.batch_begin; c < block.batch_end; c += lanes)
                transpose_square<T>(args.source + r * args.source_row_stride + c, args.source_row_stride, rows,
                                    block.batch_end - c < lanes ? block.batch_end - c : lanes,
                                    args.destination + c * args.destination_stride + r, args.destination_stride,
                                    written);
        else
            for (int64_t c = block.batch_begin; c < block.batch_end; ++c)
                S::store_first(args.destination + c * args.destination_stride + r,
                               S::load_first(args.source + c * args.source_column_stride + r, rows), written);
    }
}

} // namespace
