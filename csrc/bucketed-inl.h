// The bucketed product: for six rows and one panel of the batch, all accumulators stay in registers while the
// columns of the group go by, sorted by mask. For each mask there is a loop of its own without branches: load the
// column of x once (or two columns, where the CPU multiplies pairs), then multiply it into every row of the mask.
#pragma once

#include "layout-inl.h"
#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

// Rows that are finished in a small tile before they are written to y: whole groups and whole squares of lanes.
constexpr int tile_groups = 8;
constexpr int tile_rows = tile_groups * offpath::group_rows;

// Where the product stands in the streams of a group.
template <class T> struct Cursor {
    const int32_t *counts;
    const int32_t *columns;
    const typename Format<T>::Value *values;
};

template <class T, int vectors> using Accumulators = typename Simd<offpath::Sum<T>>::V[offpath::group_rows][vectors];

// One column of x, ready to be multiplied with single values.
template <class T, int vectors> struct Step {
    using S = Simd<offpath::Sum<T>>;
    typename S::V x[vectors];

    [[gnu::always_inline]] void load(const offpath::Sum<T> *panel, const int32_t *column) {
        const offpath::Sum<T> *source = panel + static_cast<int64_t>(*column) * (vectors * S::lanes);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            x[v] = S::load(source + v * S::lanes);
    }
    [[gnu::always_inline]] void multiply(offpath::Sum<T> value, typename S::V (&acc)[vectors]) {
        const typename S::V spread = S::set1(value);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[v] = S::fma(spread, x[v], acc[v]);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
// Two columns, zipped so that each pair of values meets its pair of entries.
template <int vectors> struct Step<bfloat16, vectors> {
    using B = BfloatPairs;
    B::V x[vectors];

    [[gnu::always_inline]] void load(const bfloat16 *panel, const int32_t *columns) {
        constexpr int64_t width = vectors * Simd<float>::lanes;
        const bfloat16 *first = panel + columns[0] * width, *second = panel + columns[1] * width;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v += 2) {
            const B::V a = B::load(first + v / 2 * B::entries), b = B::load(second + v / 2 * B::entries);
            x[v] = B::zip_low(a, b);
            x[v + 1] = B::zip_high(a, b);
        }
    }
    [[gnu::always_inline]] void multiply(uint32_t values, Simd<float>::V (&acc)[vectors]) {
        const B::V spread = B::set1(values);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[v] = B::dot(spread, x[v], acc[v]);
    }
};
#endif

template <class T, int vectors, int mask>
[[gnu::always_inline]] inline void bucket(Accumulators<T, vectors> &acc, Cursor<T> &at,
                                          const typename Format<T>::Panel *panel) {
    constexpr int32_t columns = Format<T>::columns_per_step;
    for (int32_t n = at.counts[mask]; n > 0; n -= columns) {
        Step<T, vectors> step;
        step.load(panel, at.columns);
        at.columns += columns;
#pragma GCC unroll 8
        for (int row = 0; row < offpath::group_rows; ++row)
            if (mask >> row & 1)
                step.multiply(*at.values++, acc[row]);
    }
    if constexpr (mask + 1 < offpath::group_masks)
        bucket<T, vectors, mask + 1>(acc, at, panel);
}

// One group times one panel of `vectors` vectors; writes the group's rows of the tile.
template <class T, int vectors>
void bucketed_group(const offpath::bucketed_args<T> &args, int64_t group, const typename Format<T>::Panel *panel,
                    offpath::Sum<T> *tile) {
    using S = Simd<offpath::Sum<T>>;
    Accumulators<T, vectors> acc;
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row) {
        const int64_t r = group * offpath::group_rows + row;
        const typename S::V start = args.bias && r < args.plan.rows ? S::set1(compute(args.bias[r])) : S::zero();
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[row][v] = start;
    }
    const auto *values = static_cast<const typename Format<T>::Value *>(args.values);
    Cursor<T> at = {args.plan.mask_counts + group * offpath::group_masks,
                    args.plan.column_order + args.plan.column_begin[group],
                    values + args.plan.slot_begin[group] / Format<T>::columns_per_step};
    bucket<T, vectors, 1>(acc, at, panel);
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            S::store(tile + row * (vectors * S::lanes) + v * S::lanes, acc[row][v]);
}

template <class T, int vectors>
void bucketed_panel(const offpath::bucketed_args<T> &args, int64_t group_begin, int64_t group_end, int64_t panel) {
    constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes, width = vectors * lanes;
    const int64_t token = panel * panel_width<T>;
    const int64_t tokens = args.batch - token < width ? args.batch - token : width;
    const auto *x =
        static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(args.plan.columns);
    alignas(64) offpath::Sum<T> tile[tile_rows * width];
    for (int64_t group = group_begin; group < group_end; group += tile_groups) {
        const int64_t end = group_end - group < tile_groups ? group_end : group + tile_groups;
        for (int64_t g = group; g < end; ++g)
            bucketed_group<T, vectors>(args, g, x, tile + (g - group) * offpath::group_rows * width);
        const int64_t first_row = group * offpath::group_rows;
        const int64_t last_row =
            end * offpath::group_rows < args.plan.rows ? end * offpath::group_rows : args.plan.rows;
        if (args.feature_major) {
            for (int64_t r = first_row; r < last_row; ++r)
                for (int64_t t = 0; t < tokens; t += lanes)
                    Simd<offpath::Sum<T>>::store_first(args.y + r * args.batch + token + t,
                                                       Simd<offpath::Sum<T>>::load(tile + (r - first_row) * width + t),
                                                       tokens - t < lanes ? tokens - t : lanes);
            continue;
        }
        for (int64_t t = 0; t < tokens; t += lanes)
            for (int64_t r = first_row; r < last_row; r += lanes) {
                const int64_t rows = last_row - r < lanes ? last_row - r : lanes;
                transpose_square<T>(tile + (r - first_row) * width + t, width, rows,
                                    tokens - t < lanes ? tokens - t : lanes, args.y + (token + t) * args.plan.rows + r,
                                    args.plan.rows, rows);
            }
    }
}

// Block: rows count groups, batch counts panels.
template <class T> void bucketed(const offpath::bucketed_args<T> &args, const offpath::Block &block) {
    constexpr int granule = Format<T>::granule / Simd<offpath::Sum<T>>::lanes; // vectors
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t width = width_of_panel<T>(panel * panel_width<T>, args.batch);
        switch (width / Format<T>::granule) {
        case 1:
            bucketed_panel<T, granule>(args, block.row_begin, block.row_end, panel);
            break;
        case 2:
            bucketed_panel<T, 2 * granule>(args, block.row_begin, block.row_end, panel);
            break;
        case 3:
            if constexpr (panel_vectors >= 3 * granule)
                bucketed_panel<T, 3 * granule>(args, block.row_begin, block.row_end, panel);
            break;
        case 4:
            if constexpr (panel_vectors >= 4 * granule)
                bucketed_panel<T, 4 * granule>(args, block.row_begin, block.row_end, panel);
            break;
        }
    }
}

} // namespace
