// The weight gradient over a plan of tiles: a row's dy stays in registers while its connections in the tile take their
// columns of x from the first-level cache, four connections at a time; four sums over lanes are then taken at once. A
// connection's order of summation depends on the batch alone.
#pragma once

#include "batch-inl.h"
#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// Where the dy of a row begins, and how far the columns of x lie apart: one behind the other, as in panels.
template <class T, int64_t width> struct EvenRows {
    static constexpr int64_t column_width = width;
    const typename Format<T>::Panel *dy;
    const typename Format<T>::Panel *operator()(int32_t row) const { return dy + row * width; }
};

// Tokens of neighbouring panels that are multiplied in one go.
template <class T, int panels, int vectors, template <class, int64_t> class Rows = EvenRows> struct TokenBlock {
    using B = BatchVector<T>;
    using S = Simd<offpath::Sum<T>>;
    using Panel = typename Format<T>::Panel;
    static constexpr int together = summed_together<offpath::Sum<T>>;
    // Sums that take turns for each connection: four of narrow registers are not enough additions to keep the processor
    // busy.
    static constexpr int chains = S::lanes < 16 && panels * vectors > 1 ? 2 : 1;
    static constexpr int64_t width = vectors * B::tokens;

    Rows<T, width> dy; // of the first panel
    const Panel *x;    // the first panel's, from the tile on
    int64_t dy_stride, x_stride;
    bool first, last; // of the batch
    offpath::Sum<T> *sums;
    T *dvalues;

    // Up to `together` connections, whose sums go to sums[0] ... or, when they are complete, to dvalues[0] ...
    template <int connections>
    [[gnu::always_inline]] void dots(const typename B::V (&row)[panels][vectors], const uint16_t *columns,
                                     offpath::Sum<T> *sums, T *dvalues) const {
        typename S::V acc[chains][together];
        const Panel *column[connections];
#pragma GCC unroll 2
        for (int i = 0; i < chains; ++i)
#pragma GCC unroll 4
            for (int c = 0; c < together; ++c)
                acc[i][c] = S::zero();
#pragma GCC unroll 4
        for (int c = 0; c < connections; ++c)
            column[c] = x + columns[c] * Rows<T, width>::column_width;
#pragma GCC unroll 8
        for (int p = 0; p < panels; ++p)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 4
                for (int c = 0; c < connections; ++c) {
                    const int step = p * vectors + v;
                    const typename B::V entries = B::load(column[c] + p * x_stride + v * B::tokens);
                    auto &sum = acc[step % chains][c];
                    sum = step < chains ? B::multiply(row[p][v], entries) : B::multiply_add(row[p][v], entries, sum);
                }
        if constexpr (chains == 2)
#pragma GCC unroll 4
            for (int c = 0; c < connections; ++c)
                acc[0][c] = S::add(acc[0][c], acc[1][c]);
        typename S::V total = sum_some<offpath::Sum<T>>(acc[0]);
        if (!first)
            total = S::add(total, S::load_first(sums, connections));
        if (last)
            S::store_first(dvalues, total, connections);
        else
            S::store_first(sums, total, connections);
    }

    // Runs of one length, which is `rest` more than a multiple of `together`.
    template <int rest>
    void each(const offpath::TileRun *runs, const offpath::TileSegment &segment, const uint16_t *columns,
              offpath::Sum<T> *sums) const {
        for (int32_t r = 0; r < segment.runs; ++r) {
            typename B::V row[panels][vectors];
            const Panel *own = dy(runs[r].row), *next = dy(runs[r + offpath::runs_ahead].row);
#pragma GCC unroll 8
            for (int p = 0; p < panels; ++p)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    row[p][v] = B::load(own + p * dy_stride + v * B::tokens);
                    __builtin_prefetch(next + p * dy_stride + v * B::tokens);
                }
            T *to = dvalues + runs[r].slot;
            for (int32_t done = rest; done < segment.length; done += together) {
                dots<together>(row, columns, sums, to);
                columns += together, sums += together, to += together;
            }
            if constexpr (rest > 0)
                dots<rest>(row, columns, sums, to);
            columns += rest, sums += rest;
        }
    }

    void tile(const offpath::TilePlan &plan, int64_t tile) const {
        const offpath::TileRun *runs = plan.runs + plan.run_begin[tile];
        int64_t connection = plan.connection_begin[tile];
        for (int32_t s = plan.segment_begin[tile]; s < plan.segment_begin[tile + 1]; ++s) {
            const offpath::TileSegment segment = plan.segments[s];
            const uint16_t *columns = plan.columns + connection;
            switch (segment.length % together) {
            case 0:
                each<0>(runs, segment, columns, sums + connection);
                break;
            case 1:
                each<1>(runs, segment, columns, sums + connection);
                break;
            case 2:
                each<2 % together>(runs, segment, columns, sums + connection);
                break;
            case 3:
                each<3 % together>(runs, segment, columns, sums + connection);
                break;
            }
            runs += segment.runs;
            connection += int64_t{segment.length} * segment.runs;
        }
    }
};

// The tiles of the block times the tokens from `token` on.
template <class T, int panels, int vectors>
void tiled_tokens(const offpath::tiled_args<T> &args, const offpath::Block &block, int64_t token) {
    using Tokens = TokenBlock<T, panels, vectors>;
    using Panel = typename Format<T>::Panel;
    const int64_t dy_columns = panel_columns<T>(args.plan.rows), x_columns = panel_columns<T>(args.plan.matrix_columns);
    for (int64_t tile = block.row_begin; tile < block.row_end; ++tile) {
        const int64_t first_column = tile % args.plan.tiles_across * args.plan.tile_width;
        const Tokens tokens = {{static_cast<const Panel *>(args.dy) + token * dy_columns},
                               static_cast<const Panel *>(args.x) + token * x_columns + first_column * Tokens::width,
                               panel_width<T> * dy_columns,
                               panel_width<T> * x_columns,
                               token == 0,
                               token + panels * Tokens::width >= args.batch,
                               args.sums,
                               args.dvalues};
        tokens.tile(args.plan, tile);
    }
}

// Block: rows count tiles. All of the batch.
template <class T> void tiled(const offpath::tiled_args<T> &args, const offpath::Block &block) {
    constexpr int vectors = panel_width<T> / BatchVector<T>::tokens, panels = dy_vectors / vectors;
    int64_t token = 0;
    while (const int64_t whole = whole_panels<T>(token, args.batch, panels)) {
        with_number<panels>(whole, [&]<int together>() { tiled_tokens<T, together, vectors>(args, block, token); });
        token += whole * panel_width<T>;
    }
    if (token < args.batch)
        with_number<vectors - 1>(width_of_panel<T>(token, args.batch) / BatchVector<T>::tokens,
                                 [&]<int left>() { tiled_tokens<T, 1, left>(args, block, token); });
}

} // namespace
