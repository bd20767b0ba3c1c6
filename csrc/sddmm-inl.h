// Sampled dense x dense: one dot product over the batch per connection. Several connections of a row share the
// loads of dy, and a register full of connections is reduced at once. A connection's order of summation does not
// depend on which connections it is computed with, nor on how the rows are split over threads.
#pragma once

#include "batch-inl.h"
#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// The panels of one product, from the one at `token` on.
template <class T> struct SddmmPanels {
    using Panel = typename Format<T>::Panel;
    const Panel *dy, *x;
    int64_t dy_columns, x_columns;
    int64_t token, end, batch; // the batch from `token` to `end`
};

template <class T>
SddmmPanels<T> sddmm_panels(const void *dy, const void *x, int64_t rows, int64_t columns, int64_t batch,
                            const offpath::Block &block) {
    using Panel = typename Format<T>::Panel;
    const int64_t begin = block.batch_begin * panel_width<T>, end = block.batch_end * panel_width<T>;
    return {static_cast<const Panel *>(dy),
            static_cast<const Panel *>(x),
            panel_columns<T>(rows),
            panel_columns<T>(columns),
            begin,
            end < batch ? end : batch,
            batch};
}

// acc[c] += the lanewise products of connection c, whose column starts at x + columns[c] * width.
template <class T, int connections>
[[gnu::always_inline]] inline void sddmm_panel(const typename Format<T>::Panel *dy, const typename Format<T>::Panel *x,
                                               const int32_t *columns, int64_t width,
                                               typename Simd<offpath::Sum<T>>::V (&acc)[connections]) {
    using B = BatchVector<T>;
    const typename Format<T>::Panel *x_of[connections];
#pragma GCC unroll 16
    for (int c = 0; c < connections; ++c)
        x_of[c] = x + columns[c] * width;
    for (int64_t t = 0; t < width; t += B::tokens) {
        const typename B::V dy_now = B::load(dy + t);
#pragma GCC unroll 16
        for (int c = 0; c < connections; ++c)
            acc[c] = B::multiply_add(dy_now, B::load(x_of[c] + t), acc[c]);
    }
}

// totals[c] = the lanewise sums of the dot product of connection c.
template <class T, int connections>
[[gnu::always_inline]] inline void sddmm_dots(const SddmmPanels<T> &panels, int64_t row, const int32_t *columns,
                                              typename Simd<offpath::Sum<T>>::V *totals) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int64_t whole = panel_width<T>;
    typename S::V acc[connections];
#pragma GCC unroll 16
    for (int c = 0; c < connections; ++c)
        acc[c] = S::zero();
    int64_t token = panels.token;
    for (; panels.end - token >= whole; token += whole) // the width is a constant here
        sddmm_panel<T, connections>(panels.dy + token * panels.dy_columns + row * whole,
                                    panels.x + token * panels.x_columns, columns, whole, acc);
    if (token < panels.end) {
        const int64_t width = width_of_panel<T>(token, panels.batch);
        sddmm_panel<T, connections>(panels.dy + token * panels.dy_columns + row * width,
                                    panels.x + token * panels.x_columns, columns, width, acc);
    }
#pragma GCC unroll 16
    for (int c = 0; c < connections; ++c)
        totals[c] = acc[c];
}

// At most `lanes` connections of one row. Fewer than a register's lanes are filled up with the last column, whose
// sums are then left alone: single dot products would wait for their own additions.
template <class T>
[[gnu::always_inline]] inline void sddmm_connections(const SddmmPanels<T> &panels, int64_t row, const int32_t *columns,
                                                     int64_t n, offpath::Sum<T> *sums) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int lanes = S::lanes;
    typename S::V totals[lanes];
    int32_t filled[lanes];
    if (n < lanes) {
        for (int64_t c = 0; c < lanes; ++c)
            filled[c] = columns[c < n ? c : n - 1];
        columns = filled;
    }
    if (n > lanes / 2) {
        sddmm_dots<T, lanes>(panels, row, columns, totals);
    } else {
        sddmm_dots<T, lanes / 2>(panels, row, columns, totals);
#pragma GCC unroll 8
        for (int c = lanes / 2; c < lanes; ++c)
            totals[c] = S::zero();
    }
    typename S::V total = sum_each<offpath::Sum<T>>(totals);
    if (panels.token > 0)
        total = S::add(total, S::load_first(sums, n));
    S::store_first(sums, total, n);
}

// Block: batch counts panels.
template <class T> void sddmm(const offpath::sddmm_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    const SddmmPanels<T> panels = sddmm_panels<T>(args.dy, args.x, args.csr.rows, args.columns, args.batch, block);
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const int64_t row_end = args.csr.crow_indices[row + 1];
        for (int64_t s = args.csr.crow_indices[row]; s < row_end; s += S::lanes) {
            const int64_t n = row_end - s < S::lanes ? row_end - s : S::lanes;
            sddmm_connections<T>(panels, row, args.csr.col_indices + s, n, args.sums + s);
            if (static_cast<const void *>(args.sums) != args.dvalues && panels.end == args.batch)
                S::store_first(args.dvalues + s, S::load_first(args.sums + s, n), n);
        }
    }
}

} // namespace
