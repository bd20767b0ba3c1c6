// The bucketed product: for six rows and one panel of the batch, all accumulators stay in registers while the
// columns of the group go by, sorted by mask. For each mask there is a loop of its own without branches: load the
// column of x once, then multiply it into every row that the mask names.
#pragma once

#include "pack-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// Rows that are finished in a small tile before they are written to y: whole groups and whole squares of lanes.
constexpr int tile_groups = 8;
constexpr int tile_rows = tile_groups * offpath::group_rows;

// Where the product stands in the streams of a group.
template <class T> struct Cursor {
    const int32_t *counts;
    const int32_t *columns;
    const T *values;
};

template <class T, int vectors, int mask>
[[gnu::always_inline]] inline void bucket(typename Simd<T>::V (&acc)[offpath::group_rows][vectors], Cursor<T> &at,
                                          const T *panel) {
    using S = Simd<T>;
    for (int32_t n = at.counts[mask]; n > 0; --n) {
        const T *x = panel + static_cast<int64_t>(*at.columns++) * (vectors * S::lanes);
        typename S::V column[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            column[v] = S::load(x + v * S::lanes);
#pragma GCC unroll 8
        for (int row = 0; row < offpath::group_rows; ++row)
            if (mask >> row & 1) {
                const typename S::V value = S::set1(*at.values++);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    acc[row][v] = S::fma(value, column[v], acc[row][v]);
            }
    }
    if constexpr (mask + 1 < offpath::group_masks)
        bucket<T, vectors, mask + 1>(acc, at, panel);
}

// One group times one panel of `vectors` vectors; writes the group's rows of the tile.
template <class T, int vectors>
void bucketed_group(const offpath::bucketed_args<T> &args, int64_t group, const T *panel, T *tile) {
    using S = Simd<T>;
    typename S::V acc[offpath::group_rows][vectors];
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row) {
        const int64_t r = group * offpath::group_rows + row;
        const typename S::V start = args.bias && r < args.plan.rows ? S::set1(args.bias[r]) : S::zero();
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[row][v] = start;
    }
    const int64_t begin = args.plan.group_begin[group];
    Cursor<T> at = {args.plan.mask_counts + group * offpath::group_masks, args.plan.column_order + begin,
                    args.values + begin};
    bucket<T, vectors, 1>(acc, at, panel);
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            S::store(tile + row * (vectors * S::lanes) + v * S::lanes, acc[row][v]);
}

template <class T, int vectors>
void bucketed_panel(const offpath::bucketed_args<T> &args, int64_t group_begin, int64_t group_end, int64_t panel) {
    constexpr int64_t lanes = Simd<T>::lanes, width = vectors * lanes;
    const int64_t token = panel * panel_width<T>;
    const int64_t tokens = args.batch - token < width ? args.batch - token : width;
    alignas(64) T tile[tile_rows * width];
    for (int64_t group = group_begin; group < group_end; group += tile_groups) {
        const int64_t end = group_end - group < tile_groups ? group_end : group + tile_groups;
        for (int64_t g = group; g < end; ++g)
            bucketed_group<T, vectors>(args, g, args.panels + token * args.plan.columns,
                                       tile + (g - group) * offpath::group_rows * width);
        const int64_t first_row = group * offpath::group_rows;
        const int64_t last_row =
            end * offpath::group_rows < args.plan.rows ? end * offpath::group_rows : args.plan.rows;
        for (int64_t t = 0; t < tokens; t += lanes)
            for (int64_t r = first_row; r < last_row; r += lanes) {
                const int64_t rows = last_row - r < lanes ? last_row - r : lanes;
                transpose_square(tile + (r - first_row) * width + t, width, rows,
                                 tokens - t < lanes ? tokens - t : lanes, args.y + (token + t) * args.plan.rows + r,
                                 args.plan.rows, rows);
            }
    }
}

// Block: rows count groups, batch counts panels.
template <class T> void bucketed(const offpath::bucketed_args<T> &args, const offpath::Block &block) {
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t vectors = width_of_panel<T>(panel * panel_width<T>, args.batch) / Simd<T>::lanes;
        switch (vectors) {
        case 1:
            bucketed_panel<T, 1>(args, block.row_begin, block.row_end, panel);
            break;
        case 2:
            bucketed_panel<T, 2>(args, block.row_begin, block.row_end, panel);
            break;
#if defined(__AVX512F__)
        case 3:
            bucketed_panel<T, 3>(args, block.row_begin, block.row_end, panel);
            break;
        case 4:
            bucketed_panel<T, 4>(args, block.row_begin, block.row_end, panel);
            break;
#endif
        }
    }
}

} // namespace
