// The product of int8 values with int8 activations on AMX: sums are whole numbers, as those of the vectors'
// (int8_dots-inl.h) are, and so the same.
#pragma once

#include "amx_rows-inl.h"

namespace {

// The bits of 16 numbers of 32 each, in which four neighbours of the inner dimension are one.
using Quads = Simd<float>;

// to[j, i] = from[i, j], of 16 x 16 numbers.
inline void transpose_quads(const void *from, int64_t from_stride, void *to, int64_t to_stride) {
    Quads::V square[strip_lines];
    for (int64_t i = 0; i < strip_lines; ++i)
        square[i] = Quads::load(static_cast<const float *>(from) + i * from_stride);
    transpose_registers<Quads>(square);
    for (int64_t i = 0; i < strip_lines; ++i)
        Quads::store(static_cast<float *>(to) + i * to_stride, square[i]);
}

// Block: rows count words, batch counts strips.
inline void level_tiles(const offpath::level_tiles_args &args, const offpath::Block &block) {
    for (int64_t strip = block.batch_begin; strip < block.batch_end; ++strip)
        for (int64_t word = block.row_begin; word < block.row_end; ++word) {
            uint8_t *levels = args.levels + (strip * args.words + word) * offpath::int8_entries;
            for (int64_t i = 0; i < offpath::int8_entries; ++i)
                levels[i] ^= 128; // the numbers that they stand for, as int8
            transpose_quads(levels, strip_lines, levels, strip_lines);
        }
}

// Block: rows count strips, batch counts strips of tokens.
inline void amx_dots(const offpath::amx_dots_args &args, const offpath::Block &block) {
    using offpath::int8_entries;
    const int64_t words = args.bitmap.words_per_row, strips = block.row_end - block.row_begin;
    const TileRegisters registers;
    UnreadRows<int8_t, int8_t> unread(args.bitmap, args.values, block.row_begin * strip_lines, strips * strip_lines,
                                      words);
    AmxStep step(words);
    do { // without columns, the totals are zero
        unread.fill(step, args.filled);
        multiply_strips<true>(
            Strips<int8_t>{args.filled, (step.end - step.begin) * int8_entries, strips},
            Strips<int8_t>{args.x + (block.batch_begin * words + step.begin) * int8_entries, words * int8_entries,
                           block.batch_end - block.batch_begin},
            step, args.sums, [](int64_t, int32_t *) { return true; },
            [&](int64_t strip, int64_t strip_of_tokens, const int32_t *sums) {
                int32_t *totals =
                    args.totals + strip_of_tokens * strip_lines * args.totals_stride + strip * strip_lines;
                for (int64_t row = 0; row < pair_lines; row += strip_lines)
                    for (int64_t token = 0; token < pair_lines; token += strip_lines)
                        transpose_quads(sums + row * pair_lines + token, pair_lines,
                                        totals + token * args.totals_stride + row, args.totals_stride);
            });
        step.move_on();
    } while (step.begin < words);
}

} // namespace
