// Products with int8 values, one scale a row: over bits for a few tokens, over a plan for many. Every int8 is a float
// and a bfloat16, so that values are multiplied and summed as they are; a finished sum is multiplied by its row's
// scale.
#pragma once

#include "bitmap-inl.h"
#include "bucketed-inl.h"
#include "gather-inl.h"
#include "simd_bytes.h"

namespace {

// y[i] = bias[i] + scales[i] * size * sums[i] for `count` neighbouring rows.
template <class T, int most, class Sums>
[[gnu::always_inline]] inline void scale_rows(const Sums *sums, const float *scales, float size, const T *bias,
                                              int64_t count, T *y) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int lanes = S::lanes;
    offpath::Sum<T> rows[most] = {};
    for (int64_t i = 0; i < count; ++i)
        // The product of two small scales may be below what a float holds where that with the sum is not.
        rows[i] = static_cast<offpath::Sum<T>>(static_cast<double>(sums[i]) * (static_cast<double>(scales[i]) * size));
    if (bias)
        for (int64_t i = 0; i < count; ++i)
            rows[i] += compute(bias[i]);
    for (int64_t i = 0; i < count; i += lanes)
        S::store_first(y + i, S::load(rows + i), count - i < lanes ? count - i : lanes);
}

// What one row and each token add up to, lane by lane.
template <class T, int tokens, bool finite>
[[gnu::always_inline]] inline void int8_row(const offpath::bitmap_int8_args<T> &args, int64_t row,
                                            typename Simd<offpath::Sum<T>>::V (&sums)[tokens]) {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    constexpr int parts = 64 / C::columns;
    // With few tokens, several sums take turns, so that no addition waits for the one before it.
    constexpr int turns = tokens <= 2 && parts <= 4 ? parts : 1;
    const auto &bitmap = args.bitmap;
    const int64_t width = 64 * bitmap.words_per_row;
    typename S::V acc[turns][tokens];
    for (int i = 0; i < turns; ++i)
        for (int t = 0; t < tokens; ++t)
            acc[i][t] = S::zero();
    const int8_t *values = args.values + bitmap.crow_indices[row];
    for (int64_t w = 0; w < bitmap.words_per_row; ++w) {
        const uint64_t word = bitmap.words[row * bitmap.words_per_row + w];
        __builtin_prefetch(values + prefetched_bytes);
        const WidenedWord<T> widened{spread_bytes(values, word)};
        values += __builtin_popcountll(word);
        each_part<parts>([&] [[gnu::always_inline]] (int part) {
            const typename C::V spread = widened.part(part);
            const uint32_t bits = static_cast<uint32_t>(word >> part * C::columns);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) { // masked where an infinite input would meet a missing weight's zero
                auto &sum = acc[part % turns][t];
                const T *x = args.x + t * width + w * 64 + part * C::columns;
                sum = C::multiply_add(spread, finite ? C::load(x) : C::load_where(x, bits), sum);
            }
        });
    }
    for (int t = 0; t < tokens; ++t) {
        sums[t] = acc[0][t];
        for (int i = 1; i < turns; ++i)
            sums[t] = S::add(sums[t], acc[i][t]);
    }
}

template <class T, int tokens, bool finite>
void bitmap_int8_rows(const offpath::bitmap_int8_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    const int64_t rows = args.bitmap.rows;
    // As many rows as a register has lanes, so that it takes one tree of additions to sum all their lanes.
    for (int64_t first = block.row_begin; first < block.row_end; first += S::lanes) {
        const int64_t count = block.row_end - first < S::lanes ? block.row_end - first : S::lanes;
        typename S::V of_row[tokens][S::lanes];
        for (int i = 0; i < S::lanes; ++i) {
            typename S::V sums[tokens];
            if (i < count)
                int8_row<T, tokens, finite>(args, first + i, sums);
            for (int t = 0; t < tokens; ++t)
                of_row[t][i] = i < count ? sums[t] : S::zero();
        }
        for (int t = 0; t < tokens; ++t) {
            offpath::Sum<T> sums[S::lanes];
            S::store(sums, sum_each<offpath::Sum<T>>(of_row[t]));
            scale_rows<T, S::lanes>(sums, args.scales + first, 1, args.bias ? args.bias + first : nullptr, count,
                                    args.y + t * rows + first);
        }
    }
}

template <class T> void bitmap_int8(const offpath::bitmap_int8_args<T> &args, const offpath::Block &block) {
    if (!args.x_is_finite)
        return bitmap_int8_rows<T, 1, false>(args, block);
    switch (args.batch) {
    case 1:
        return bitmap_int8_rows<T, 1, true>(args, block);
    case 2:
        return bitmap_int8_rows<T, 2, true>(args, block);
    case 3:
        return bitmap_int8_rows<T, 3, true>(args, block);
    case 4:
        return bitmap_int8_rows<T, 4, true>(args, block);
    case 5:
        return bitmap_int8_rows<T, 5, true>(args, block);
    case 6:
        return bitmap_int8_rows<T, 6, true>(args, block);
    case 7:
        return bitmap_int8_rows<T, 7, true>(args, block);
    case 8:
        return bitmap_int8_rows<T, 8, true>(args, block);
    }
}

template <class T> void gather_int8(const offpath::gather_int8_args<T> &args, const offpath::Block &block) {
    gather_values<T>(args.plan, args.values, args.ordered, block);
}

// Block: rows count groups, batch counts panels.
template <class T> void bucketed_int8(const offpath::bucketed_int8_args<T> &args, const offpath::Block &block) {
    const Output<T> output = {args.y, args.plan.rows, args.batch, false};
    const offpath::Sum<T> zeros[offpath::group_rows] = {};
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t token = panel * panel_width<T>;
        const auto *x =
            static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(args.plan.columns);
        with_vectors_of_panel<T>(token, args.batch, [&]<int vectors>(Vectors<vectors>) {
            each_group<T, vectors>(
                output, block.row_begin, block.row_end, token, [&](int64_t group, offpath::Sum<T> *tile) {
                    bucketed_group<Multiplied<T>, vectors>(args.plan, args.values, group, x, zeros, tile);
                    scale_group<T, vectors>(args.scales, args.bias, group, args.plan.rows, tile);
                });
        });
    }
}

} // namespace
