// The product over runs: a row's sums for a strip of the batch stay in registers while its connections in the tile take
// their columns of x from the first-level cache. A connection costs no branch that the processor could mispredict. Each
// row adds its connections in ascending order, whatever the tiles.
#pragma once

#include "groups-inl.h"

namespace {

// One strip: `panels` neighbouring panels of `vectors` vectors.
template <class T, int panels, int vectors> struct RunStrip {
    using Sum = offpath::Sum<T>;
    using S = Simd<Sum>;
    static constexpr int64_t column_width = vectors * S::lanes, width = panels * column_width;
    // Runs of one length that go side by side, as far as half of the registers hold their sums: a few vectors are not
    // enough additions to keep the processor busy.
    static constexpr int most = vector_registers / 2 / (panels * vectors), together = most >= 4 ? 4 : most >= 2 ? 2 : 1;

    const Sum *x;     // the first panel's, from the tile on
    int64_t x_stride; // between panels
    int64_t first_row;

    template <int count>
    [[gnu::always_inline]] void add(const offpath::TileRun *run, int32_t length, const uint16_t *columns,
                                    const Sum *values, Sum *sums) const {
        const Sum *panel[panels];
        for (int p = 0; p < panels; ++p)
            panel[p] = x + p * x_stride;
        typename S::V acc[count][panels][vectors];
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int p = 0; p < panels; ++p)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    acc[i][p][v] = S::load(sums + (run[i].row - first_row) * width + p * column_width + v * S::lanes);
        for (int32_t s = 0; s < length; ++s)
#pragma GCC unroll 4
            for (int i = 0; i < count; ++i) {
                const int64_t column = columns[i * length + s] * column_width;
                const typename S::V value = S::set1(values[run[i].slot + s]);
#pragma GCC unroll 8
                for (int p = 0; p < panels; ++p)
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v)
                        acc[i][p][v] = S::fma(value, S::load(panel[p] + column + v * S::lanes), acc[i][p][v]);
            }
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int p = 0; p < panels; ++p)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    S::store(sums + (run[i].row - first_row) * width + p * column_width + v * S::lanes, acc[i][p][v]);
    }

    // The sums begin with those of `first_row`.
    void tile(const offpath::TilePlan &plan, int64_t tile, const Sum *values, Sum *sums) const {
        const offpath::TileRun *run = plan.runs + plan.run_begin[tile];
        const uint16_t *columns = plan.columns + plan.connection_begin[tile];
        for (int32_t s = plan.segment_begin[tile]; s < plan.segment_begin[tile + 1]; ++s) {
            const offpath::TileSegment segment = plan.segments[s];
            int32_t left = segment.runs;
            for (; left >= together; left -= together, run += together, columns += together * segment.length)
                add<together>(run, segment.length, columns, values, sums);
            for (; left > 0; --left, ++run, columns += segment.length)
                add<1>(run, segment.length, columns, values, sums);
        }
    }
};

// Rows of tiles from `first` to `last`, at most tile_rows_together, times the strip that starts at `token`.
template <class T, int panels, int vectors>
void runs_of_strip(const offpath::runs_args<T> &args, int64_t first, int64_t last, int64_t token) {
    using Strip = RunStrip<T, panels, vectors>;
    using Sum = offpath::Sum<T>;
    using S = Simd<Sum>;
    const offpath::TilePlan &plan = args.plan;
    const int64_t columns = panel_columns<T>(plan.matrix_columns), first_row = first * offpath::run_rows;
    const int64_t last_row = last * offpath::run_rows < plan.rows ? last * offpath::run_rows : plan.rows;
    alignas(64) Sum tile[offpath::tile_rows_together * offpath::run_rows * Strip::width];
    const auto each_row = [&](const auto &body) {
        for (int64_t r = first_row; r < last_row; ++r)
            for (int64_t t = 0; t < Strip::width; t += S::lanes)
                body(tile + (r - first_row) * Strip::width + t, r, args.bias ? compute(args.bias[r]) : Sum{0});
    };
    each_row([&](Sum *at, int64_t, Sum bias) { S::store(at, S::set1(args.scales ? 0 : bias)); });
    const Sum *x = static_cast<const Sum *>(args.panels) + token * columns;
    for (int64_t across = 0; across < plan.tiles_across; ++across) {
        const Strip strip = {x + across * plan.tile_width * Strip::column_width, panel_width<T> * columns, first_row};
        for (int64_t row = first; row < last; ++row)
            strip.tile(plan, row * plan.tiles_across + across, args.values, tile);
    }
    if (args.scales)
        each_row([&](Sum *at, int64_t r, Sum bias) {
            S::store(at, S::fma(S::load(at), S::set1(args.scales[r]), S::set1(bias)));
        });
    const Output<T> output = {args.y, plan.rows, args.batch, args.feature_major};
    output.template write<Strip::width>(tile, first_row, last_row, token);
}

// Block: rows count rows of tiles, at most tile_rows_together; batch counts strips.
template <class T> void multiply_runs(const offpath::runs_args<T> &args, const offpath::Block &block) {
    constexpr int64_t width = panel_width<T>, strip = run_panels<T> * width;
    int64_t token = block.batch_begin * strip;
    const int64_t end = block.batch_end * strip < args.batch ? block.batch_end * strip : args.batch;
    while (token < end)
        if (const int64_t whole = whole_panels<T>(token, end, run_panels<T>); whole > 0) {
            with_number<run_panels<T>>(whole, [&]<int panels>() {
                runs_of_strip<T, panels, panel_vectors>(args, block.row_begin, block.row_end, token);
            });
            token += whole * width;
        } else {
            with_vectors_of_panel<T>(token, args.batch, [&]<int vectors>(Vectors<vectors>) {
                runs_of_strip<T, 1, vectors>(args, block.row_begin, block.row_end, token);
            });
            token += width;
        }
}

// None where plans are buckets.
template <class T>
constexpr void (*runs)(const offpath::runs_args<T> &, const offpath::Block &) = [] {
    if constexpr (run_panels<T> > 0)
        return multiply_runs<T>;
    else
        return nullptr;
}();

} // namespace
