// Copies activations into the panels that the bucketed product reads.
#pragma once

#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

// Vectors of the batch in one panel: with six rows of accumulators, as many as the registers of the ISA hold.
#if defined(__AVX512F__)
constexpr int panel_vectors = 4;
#else
constexpr int panel_vectors = 2;
#endif

template <class T> constexpr int64_t panel_width = panel_vectors * Simd<T>::lanes;

// Entries of the panel that starts at token `begin`, padding included: whole vectors.
template <class T> int64_t width_of_panel(int64_t begin, int64_t batch) {
    constexpr int64_t lanes = Simd<T>::lanes;
    return batch - begin >= panel_width<T> ? panel_width<T> : (batch - begin + lanes - 1) / lanes * lanes;
}

// Block: rows are columns of the sparse matrix, batch counts panels.
template <class T> void pack(const offpath::pack_args<T> &args, const offpath::Block &block) {
    using S = Simd<T>;
    constexpr int64_t lanes = S::lanes;
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t begin = panel * panel_width<T>, width = width_of_panel<T>(begin, args.batch);
        const int64_t tokens = args.batch - begin < width ? args.batch - begin : width;
        T *destination = args.panels + begin * args.columns;
        const T *source = args.x + begin * args.x_batch_stride;
        if (args.x_batch_stride == 1) {
            for (int64_t c = block.row_begin; c < block.row_end; ++c)
                for (int64_t t = 0; t < width; t += lanes) {
                    const int64_t n = tokens - t < lanes ? tokens - t : lanes;
                    S::store(destination + c * width + t, S::load_first(source + c * args.x_feature_stride + t, n));
                }
        } else {
            for (int64_t c = block.row_begin; c < block.row_end; c += lanes) {
                const int64_t columns = block.row_end - c < lanes ? block.row_end - c : lanes;
                for (int64_t t = 0; t < width; t += lanes)
                    transpose_square(source + t * args.x_batch_stride + c, args.x_batch_stride,
                                     tokens - t < lanes ? tokens - t : lanes, columns, destination + c * width + t,
                                     width, lanes);
            }
        }
    }
}

} // namespace
