// What the products share that take six rows and one panel of the batch at a time: the accumulators in registers, the
// steps that multiply columns of the panel into them, and the way of the finished rows to y.
#pragma once

#include "layout-inl.h"
#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

// Rows that are finished in a small tile before they are written to y.
constexpr int tile_rows = offpath::tile_groups * offpath::group_rows;

template <class T, int vectors> using Accumulators = typename Simd<offpath::Sum<T>>::V[offpath::group_rows][vectors];

// One column of x, ready to be multiplied with single values. In a panel, columns lie panel_stride entries apart.
template <class T, int vectors> struct Step {
    using S = Simd<offpath::Sum<T>>;
    typename S::V x[vectors];

    static constexpr int panel_stride = vectors * S::lanes;

    template <int stride = panel_stride>
    [[gnu::always_inline]] void load(const offpath::Sum<T> *panel, const int32_t *column) {
        const offpath::Sum<T> *source = panel + static_cast<int64_t>(*column) * stride;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            x[v] = S::load(source + v * S::lanes);
    }
    template <int stride = panel_stride>
    [[gnu::always_inline]] static void prefetch(const offpath::Sum<T> *panel, int32_t column) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            __builtin_prefetch(panel + static_cast<int64_t>(column) * stride + v * S::lanes);
    }
    // With `half`, the upper half of the last register of sums is not wanted.
    template <bool half = false>
    [[gnu::always_inline]] void multiply(offpath::Sum<T> value, typename S::V (&acc)[vectors]) const {
        const typename S::V spread = S::set1(value);
#pragma GCC unroll 8
        for (int v = 0; v < vectors - half; ++v)
            acc[v] = S::fma(spread, x[v], acc[v]);
        if constexpr (half)
            acc[vectors - 1] = S::fma_lower_half(spread, x[vectors - 1], acc[vectors - 1]);
    }
};

#ifdef OFFPATH_BFLOAT_PAIRS
// Two columns, zipped so that each pair of values meets its pair of entries. The last tokens of a panel may fill only
// the lower half of its last register.
template <int vectors> struct Step<bfloat16, vectors> {
    using B = BfloatPairs;
    B::V x[vectors];

    static constexpr int64_t panel_stride = (vectors + 1) / 2 * B::entries;

    template <int64_t stride = panel_stride>
    [[gnu::always_inline]] void load(const bfloat16 *panel, const int32_t *columns) {
        const bfloat16 *first = panel + columns[0] * stride, *second = panel + columns[1] * stride;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v += 2) {
            const B::V a = B::load(first + v / 2 * B::entries), b = B::load(second + v / 2 * B::entries);
            x[v] = B::zip_low(a, b);
            if (v + 1 < vectors)
                x[v + 1] = B::zip_high(a, b);
        }
    }
    template <bool half = false>
    [[gnu::always_inline]] void multiply(uint32_t values, Simd<float>::V (&acc)[vectors]) const {
        const B::V spread = B::set1(values);
#pragma GCC unroll 8
        for (int v = 0; v < vectors - half; ++v)
            acc[v] = B::dot(spread, x[v], acc[v]);
#if defined(__AVX512F__) // see halves_pay
        if constexpr (half)
            acc[vectors - 1] = B::dot_lower_half(spread, x[vectors - 1], acc[vectors - 1]);
#endif
    }
};
#endif

// What the sums of a group start from: the bias, or zero.
template <class T> struct GroupStart {
    offpath::Sum<T> of_row[offpath::group_rows];

    GroupStart(const T *bias, int64_t group, int64_t rows) {
        for (int row = 0; row < offpath::group_rows; ++row) {
            const int64_t r = group * offpath::group_rows + row;
            of_row[row] = bias && r < rows ? compute(bias[r]) : 0;
        }
    }
};

template <class T, int vectors>
[[gnu::always_inline]] inline void start_group(Accumulators<T, vectors> &acc, const offpath::Sum<T> *of_row) {
    using S = Simd<offpath::Sum<T>>;
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[row][v] = S::set1(of_row[row]);
}

template <class T, int vectors>
[[gnu::always_inline]] inline void load_group(Accumulators<T, vectors> &acc, const offpath::Sum<T> *sums) {
    using S = Simd<offpath::Sum<T>>;
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            acc[row][v] = S::load(sums + row * (vectors * S::lanes) + v * S::lanes);
}

template <class T, int vectors>
[[gnu::always_inline]] inline void store_group(const Accumulators<T, vectors> &acc, offpath::Sum<T> *tile) {
    using S = Simd<offpath::Sum<T>>;
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            S::store(tile + row * (vectors * S::lanes) + v * S::lanes, acc[row][v]);
}

// tile = bias + scales * tile for the rows of a group.
template <class T, int vectors>
[[gnu::noinline]] void scale_group(const float *scales, const T *bias, int64_t group, int64_t rows,
                                   offpath::Sum<T> *tile) {
    using S = Simd<offpath::Sum<T>>;
    const GroupStart<T> start(bias, group, rows);
    for (int64_t row = 0, r = group * offpath::group_rows; row < offpath::group_rows && r < rows; ++row, ++r)
        for (int v = 0; v < vectors; ++v) {
            offpath::Sum<T> *sums = tile + (row * vectors + v) * S::lanes;
            const typename S::V scale = S::set1(scales[r]);
            S::store(sums, S::fma(S::load(sums), scale, S::set1(start.of_row[row])));
        }
}

// Where finished rows go: y is [batch, rows], contiguous, or [rows, batch] where feature_major.
template <class T> struct Output {
    T *y;
    int64_t rows, batch;
    bool feature_major;

    // The tile has `width` sums of each row, for the tokens from `token` on.
    template <int64_t width>
    void write(const offpath::Sum<T> *tile, int64_t first_row, int64_t last_row, int64_t token) const {
        using S = Simd<offpath::Sum<T>>;
        constexpr int64_t lanes = S::lanes;
        const int64_t tokens = batch - token < width ? batch - token : width;
        if (feature_major) {
            for (int64_t r = first_row; r < last_row; ++r)
                for (int64_t t = 0; t < tokens; t += lanes)
                    S::store_first(y + r * batch + token + t, S::load(tile + (r - first_row) * width + t),
                                   tokens - t < lanes ? tokens - t : lanes);
            return;
        }
        for (int64_t t = 0; t < tokens; t += lanes)
            for (int64_t r = first_row; r < last_row; r += lanes) {
                const int64_t together = last_row - r < lanes ? last_row - r : lanes;
                transpose_square<T>(tile + (r - first_row) * width + t, width, together,
                                    tokens - t < lanes ? tokens - t : lanes, y + (token + t) * rows + r, rows,
                                    together);
            }
    }
};

// Calls compute_group(group, rows of the tile) for each group of a panel, or for each so many `together`, and writes
// what it left in the tile to y.
template <class T, int vectors, int together = 1, class ComputeGroup>
[[gnu::always_inline]] inline void each_group(const Output<T> &output, int64_t group_begin, int64_t group_end,
                                              int64_t token, const ComputeGroup &compute_group) {
    constexpr int64_t width = vectors * Simd<offpath::Sum<T>>::lanes;
    static_assert(offpath::tile_groups % together == 0);
    alignas(64) offpath::Sum<T> tile[tile_rows * width];
    for (int64_t group = group_begin; group < group_end; group += offpath::tile_groups) {
        const int64_t end = group_end - group < offpath::tile_groups ? group_end : group + offpath::tile_groups;
        for (int64_t g = group; g < end; g += together)
            compute_group(g, tile + (g - group) * offpath::group_rows * width);
        const int64_t last_row = end * offpath::group_rows < output.rows ? end * offpath::group_rows : output.rows;
        output.template write<width>(tile, group * offpath::group_rows, last_row, token);
    }
}

// `half`: of the last of them, no more than the lower half.
template <int n, bool half = false> struct Vectors {
    static constexpr int count = n;
};

// Calls body(Vectors<n>) for the n vectors of sums that the panel of `tokens` wide activations which starts at `token`
// needs.
template <class T, class Body> void with_vectors_of_panel(int64_t token, int64_t tokens, const Body &body) {
    constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes;
    switch (tokens - token >= panel_width<T> ? panel_vectors : (tokens - token + lanes - 1) / lanes) {
    case 1:
        return body(Vectors<1>());
    case 2:
        return body(Vectors<2>());
    case 3:
        if constexpr (panel_vectors >= 3)
            return body(Vectors<3>());
        break;
    case 4:
        if constexpr (panel_vectors >= 4)
            return body(Vectors<4>());
        break;
    }
}

} // namespace
