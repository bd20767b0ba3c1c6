// What the products on AMX share: factors as tiles, and the steps in which strips of them are multiplied.
#pragma once

#include "bitmap-inl.h"
#include "reduce-inl.h"
#include "simd_amx.h"
#include "transpose-inl.h"

namespace {

using offpath::pair_lines;
using offpath::strip_lines;
using offpath::tile_depth;
using offpath::tile_entries;

inline int64_t tiles_for(int64_t inner) { return (inner + tile_depth - 1) / tile_depth; }
inline int64_t within(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

inline void pack_tile(const offpath::pack_tiles_args &args, int64_t strip, int64_t tile) {
    using B = BfloatPairs;
    using S = Simd<float>;
    const bool inner_together = args.inner_stride == 1;
    const int64_t line = strip * strip_lines, depth = tile * tile_depth;
    const int64_t lines = within(args.lines - line, strip_lines), inner = within(args.inner - depth, tile_depth);
    const bfloat16 *source = args.matrix + line * args.line_stride + depth * args.inner_stride;
    // Pairs of neighbours of the inner dimension: [line, pair] or, where lines stand together, [pair, line].
    S::V pairs[strip_lines];
    for (int64_t i = 0; i < strip_lines; ++i)
        if (inner_together)
            pairs[i] = B::as_floats(i < lines ? B::load_first(fetched_ahead(source + i * args.line_stride), inner)
                                              : B::zero());
        else {
            const auto load = [&](int64_t k) {
                return k < inner ? B::load_first(fetched_ahead(source + k * args.inner_stride), lines) : B::zero();
            };
            pairs[i] = B::as_floats(B::interleave_low(load(2 * i), load(2 * i + 1)));
        }
    if (inner_together == args.right)
        transpose_registers<S>(pairs);
    bfloat16 *destination = args.tiles + (strip * tiles_for(args.inner) + tile) * tile_entries;
    for (int64_t i = 0; i < strip_lines; ++i)
        B::store(destination + i * tile_depth, B::as_pairs(pairs[i]));
}

// Block: rows count tiles of the inner dimension, batch counts strips. Goes on as the matrix lies in memory.
inline void pack_tiles(const offpath::pack_tiles_args &args, const offpath::Block &block) {
    if (args.inner_stride == 1)
        for (int64_t strip = block.batch_begin; strip < block.batch_end; ++strip)
            for (int64_t tile = block.row_begin; tile < block.row_end; ++tile)
                pack_tile(args, strip, tile);
    else
        for (int64_t tile = block.row_begin; tile < block.row_end; ++tile)
            for (int64_t strip = block.batch_begin; strip < block.batch_end; ++strip)
                pack_tile(args, strip, tile);
}

inline void line_sums(const offpath::line_sums_args &args, const offpath::Block &block) {
    using B = BfloatPairs;
    using S = Simd<float>;
    constexpr uint32_t ones = 0x3F803F80;
    const int64_t tiles = tiles_for(args.inner);
    for (int64_t strip = block.row_begin; strip < block.row_end; ++strip) {
        S::V sums[strip_lines] = {};
        for (int64_t tile = strip * tiles; tile < (strip + 1) * tiles; ++tile)
            for (int64_t i = 0; i < strip_lines; ++i)
                sums[i] = B::dot(B::set1(ones), B::load(args.tiles + tile * tile_entries + i * tile_depth), sums[i]);
        const int64_t line = strip * strip_lines;
        S::store_first(args.sums + line, sum_each<float>(sums), within(args.lines - line, strip_lines));
    }
}

// Where the sums of a pair of strips go: to a matrix [lines, columns], or, where `transposed`, to [columns, lines].
struct TileOutput {
    bfloat16 *matrix;
    int64_t lines, columns;
    bool transposed;

    void write(const float *sums, int64_t line, int64_t column) const {
        using B = BfloatPairs;
        using S = Simd<float>;
        const int64_t own_lines = within(lines - line, pair_lines), own_columns = within(columns - column, pair_lines);
        const auto rounded = [&](int64_t i) {
            return B::narrow(S::load(sums + i * pair_lines), S::load(sums + i * pair_lines + strip_lines));
        };
        if (!transposed) {
            for (int64_t i = 0; i < own_lines; ++i)
                B::store_first(matrix + (line + i) * columns + column, rounded(i), own_columns);
            return;
        }
        // Two lines as pairs change places with columns as single entries do.
        S::V pairs[2][strip_lines];
        for (int64_t i = 0; i < strip_lines; ++i) {
            const B::V first = rounded(2 * i), second = rounded(2 * i + 1);
            pairs[0][i] = B::as_floats(B::interleave_low(first, second));
            pairs[1][i] = B::as_floats(B::interleave_high(first, second));
        }
        for (int64_t half = 0; half * strip_lines < own_columns; ++half) {
            transpose_registers<S>(pairs[half]);
            const int64_t first_column = half * strip_lines, end = within(own_columns - first_column, strip_lines);
            for (int64_t i = 0; i < end; ++i)
                B::store_first(matrix + (column + first_column + i) * lines + line, B::as_pairs(pairs[half][i]),
                               own_lines);
        }
    }
};

// Strips of one factor, from the first tile of a step on.
template <class Entry> struct Strips {
    const Entry *tiles;
    int64_t stride, count;
};

// A step along the inner dimension.
struct AmxStep {
    int64_t begin, end, tiles;

    explicit AmxStep(int64_t tiles) : begin(0), end(within(tiles, offpath::tiles_per_step)), tiles(tiles) {}
    void move_on() {
        begin = end;
        end = begin + within(tiles - begin, offpath::tiles_per_step);
    }
    bool is_first() const { return begin == 0; }
    bool is_last() const { return end == tiles; }
};

// Adds a step's share to the sums of all pairs of strips, which stay in `kept` until the next one; those of the left
// factor wait in the outer loop, or those of the right one. `start(pair of left strips, sums)` says whether sums start
// from zero, or writes what they start from; done(pair of left strips, pair of right strips, sums) has them complete.
template <bool right_outside, class Entry, class Sum, class Start, class Done>
void multiply_strips(const Strips<Entry> &left, const Strips<Entry> &right, const AmxStep &step, Sum *kept,
                     const Start &start, const Done &done) {
    const Strips<Entry> &outer = right_outside ? right : left, &inner = right_outside ? left : right;
    for (int64_t o = 0; o < outer.count; o += 2)
        for (int64_t i = 0; i < inner.count; i += 2) {
            const int64_t l = right_outside ? i : o, r = right_outside ? o : i;
            const bool from_zero = step.is_first() && start(l, kept);
            const auto multiply = [&]<int lefts, int rights>() {
                TileRegisters::multiply<lefts, rights>(left.tiles + l * left.stride, left.stride,
                                                       right.tiles + r * right.stride, right.stride,
                                                       step.end - step.begin, from_zero, kept);
            };
            if (left.count - l == 1)
                right.count - r == 1 ? multiply.template operator()<1, 1>() : multiply.template operator()<1, 2>();
            else
                right.count - r == 1 ? multiply.template operator()<2, 1>() : multiply.template operator()<2, 2>();
            if (step.is_last())
                done(l, r, kept);
            if (!(step.is_first() && step.is_last())) // or the same memory, which is in the cache, serves all
                kept += offpath::pair_sums;
        }
}

} // namespace
