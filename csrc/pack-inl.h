// Copies activations into the panels that the bucketed product and the weight gradient read.
#pragma once

#include "layout-inl.h"
#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

// Columns `begin` to `end` of a panel of `width` tokens, of which `tokens` are real.
template <class T> struct PackPanel {
    using Panel = typename Format<T>::Panel;
    using S = Simd<Panel>;

    // The columns stand side by side in the batch's direction.
    static void from_features(const T *x, int64_t stride, int64_t tokens, int64_t begin, int64_t end, Panel *panel,
                              int64_t width) {
        for (int64_t c = begin; c < end; ++c)
            for (int64_t t = 0; t < width; t += S::lanes) {
                const int64_t n = tokens - t < S::lanes ? tokens - t : S::lanes;
                S::store(panel + c * width + t, S::load_first(x + c * stride + t, n));
            }
    }

    // The tokens stand side by side.
    static void from_tokens(const T *x, int64_t stride, int64_t tokens, int64_t begin, int64_t end, Panel *panel,
                            int64_t width) {
        constexpr int64_t lanes = S::lanes;
        for (int64_t c = begin; c < end; c += lanes) {
            const int64_t columns = end - c < lanes ? end - c : lanes;
            for (int64_t t = 0; t < width; t += lanes)
                transpose_square<T>(x + t * stride + c, stride, tokens - t < lanes ? tokens - t : lanes, columns,
                                    panel + c * width + t, width, lanes);
        }
    }
};

#ifdef OFFPATH_BFLOAT_PAIRS
// 32 tokens of a column fill a register, in the order that zipping two columns undoes.
template <> struct PackPanel<bfloat16> {
    using B = BfloatPairs;

    static void from_features(const bfloat16 *x, int64_t stride, int64_t tokens, int64_t begin, int64_t end,
                              bfloat16 *panel, int64_t width) {
        for (int64_t c = begin; c < end; ++c)
            for (int64_t t = 0; t < width; t += B::entries) {
                const int64_t n = tokens - t < B::entries ? tokens - t : B::entries;
                B::store(panel + c * width + t, B::order_for_zip(B::load_first(x + c * stride + t, n)));
            }
    }

    static void from_tokens(const bfloat16 *x, int64_t stride, int64_t tokens, int64_t begin, int64_t end,
                            bfloat16 *panel, int64_t width) {
        for (int64_t c = begin; c < end; c += B::entries)
            for (int64_t t = 0; t < width; t += B::entries)
                square(x + t * stride + c, stride, tokens - t, end - c < B::entries ? end - c : B::entries,
                       panel + c * width + t, width);
    }

    // 32 tokens x 32 columns: neighbouring tokens are zipped to 32-bit entries, which the float transpose moves.
    static void square(const bfloat16 *x, int64_t stride, int64_t tokens, int64_t columns, bfloat16 *panel,
                       int64_t width) {
        using S = Simd<float>;
        S::V halves[2][S::lanes];
        for (int pair = 0; pair < S::lanes; ++pair) {
            B::V row[2];
            for (int i = 0; i < 2; ++i) {
                const bfloat16 *token = x + (2 * pair + i) * stride;
                row[i] =
                    2 * pair + i < tokens ? B::order_for_zip(B::load_first(fetched_ahead(token), columns)) : B::zero();
            }
            halves[0][pair] = B::as_floats(B::zip_low(row[0], row[1]));
            halves[1][pair] = B::as_floats(B::zip_high(row[0], row[1]));
        }
        for (int half = 0; half < 2; ++half) {
            transpose_registers<S>(halves[half]);
            for (int64_t c = half * S::lanes; c < columns && c < (half + 1) * S::lanes; ++c)
                B::store(panel + c * width, B::order_for_zip(B::as_pairs(halves[half][c - half * S::lanes])));
        }
    }
};
#endif

// Block: rows are columns of the sparse matrix, batch counts panels.
template <class T> void pack(const offpath::pack_args<T> &args, const offpath::Block &block) {
    using Panel = typename Format<T>::Panel;
    const int64_t columns = panel_columns<T>(args.columns);
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t token = panel * panel_width<T>, width = width_of_panel<T>(token, args.batch);
        const int64_t tokens = args.batch - token < width ? args.batch - token : width;
        Panel *destination = static_cast<Panel *>(args.panels) + token * columns;
        const T *source = args.x + token * args.x_batch_stride;
        if (args.x_batch_stride == 1)
            PackPanel<T>::from_features(source, args.x_feature_stride, tokens, block.row_begin, block.row_end,
                                        destination, width);
        else
            PackPanel<T>::from_tokens(source, args.x_batch_stride, tokens, block.row_begin, block.row_end, destination,
                                      width);
        if (block.row_end == args.columns)
            for (int64_t i = args.columns * width; i < columns * width; ++i)
                destination[i] = Panel{};
    }
}

} // namespace
