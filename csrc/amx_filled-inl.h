// The filled products of bfloat16 on AMX. The weight is written out in tiles that stay in cache: as the left factor of
// the product, where a register of its columns is a row of a tile, and as the right one of dX, where two rows are
// zipped.
#pragma once

#include "amx_rows-inl.h"
#include "filled_dx-inl.h"
#include "filled_gradient-inl.h"

namespace {

// Calls body(sums, row of the weight) for the registers of sums of a pair of strips.
template <class Body> void each_row_of_pair(float *sums, int64_t first_row, const Body &body) {
    for (int64_t i = 0; i < pair_lines; ++i) {
        body(sums + i * pair_lines, first_row + i);
        body(sums + i * pair_lines + strip_lines, first_row + i);
    }
}

template <class Value>
void amx_product_of(const offpath::amx_product_args &args, const Value *values, const offpath::Block &block) {
    using S = Simd<float>;
    const int64_t rows = args.bitmap.rows, tiles = tiles_for(args.bitmap.columns);
    const int64_t first_row = block.row_begin * strip_lines, strips = block.row_end - block.row_begin;
    const float *scales = args.weight.int8.scales;
    const auto scale_of = [&](int64_t row) { return S::set1(row < rows ? scales[row] : 0); };
    const auto bias_of = [&](int64_t row) { return S::set1(args.bias && row < rows ? compute(args.bias[row]) : 0); };
    const TileOutput output = {args.y, rows, args.batch, !args.feature_major};
    const TileRegisters registers;
    UnreadRows<Value, bfloat16> unread(args.bitmap, values, first_row, strips * strip_lines, tiles);
    AmxStep step(tiles);
    do { // without columns, y is the bias
        unread.fill(step, args.filled);
        multiply_strips<true>(
            Strips<bfloat16>{args.filled, (step.end - step.begin + 1) / 2 * 2 * tile_entries, strips},
            Strips<bfloat16>{args.x + (block.batch_begin * tiles + step.begin) * tile_entries, tiles * tile_entries,
                             block.batch_end - block.batch_begin},
            step, args.sums,
            [&](int64_t strip, float *sums) {
                if (scales || !args.bias)
                    return true;
                each_row_of_pair(sums, first_row + strip * strip_lines,
                                 [&](float *at, int64_t row) { S::store(at, bias_of(row)); });
                return false;
            },
            [&](int64_t strip, int64_t strip_of_tokens, float *sums) {
                const int64_t row_of_pair = first_row + strip * strip_lines;
                if (scales)
                    each_row_of_pair(sums, row_of_pair, [&](float *at, int64_t row) {
                        S::store(at, S::fma(S::load(at), scale_of(row), bias_of(row)));
                    });
                output.write(sums, row_of_pair, (block.batch_begin + strip_of_tokens) * strip_lines);
            });
        step.move_on();
    } while (step.begin < tiles);
}

// Block: rows count strips, batch counts strips of tokens.
inline void amx_product(const offpath::amx_product_args &args, const offpath::Block &block) {
    if (args.weight.int8.scales)
        amx_product_of(args, args.weight.int8.values, block);
    else
        amx_product_of(args, args.weight.values, block);
}

// Two rows, in some neighbouring chunks, whose values lie side by side; rows that the weight lacks are zeros.
struct RowPair {
    const offpath::amx_dx_args &args;
    const int64_t row;

    // The processor sees no pattern where rows are read in part.
    void fetch(int64_t chunk, int64_t last_chunk) const {
        const offpath::Bitmap &bitmap = args.bitmap;
        const int64_t chunks = (bitmap.columns + offpath::chunk_columns - 1) / offpath::chunk_columns;
        for (int64_t r = row; r < row + 2 && r < bitmap.rows; ++r) {
            const int32_t *of_row = args.chunk_slots + r * chunks;
            const int64_t last = last_chunk < chunks ? of_row[last_chunk] : bitmap.crow_indices[r + 1];
            for (int64_t slot = of_row[chunk]; slot < last; slot += 64 / sizeof(bfloat16))
                __builtin_prefetch(args.values + slot);
            __builtin_prefetch(args.values + last);
        }
    }

    // Writes a line of the tiles of a chunk.
    void fill(int64_t chunk, bfloat16 *entries) const {
        using C = ColumnVector<bfloat16>;
        const int64_t end = args.bitmap.rows;
        alignas(64) bfloat16 first[offpath::chunk_columns]; // waits here for the second
        const auto zip = [&] [[gnu::always_inline]] (int64_t column, C::V a, C::V b) {
            bfloat16 *of_strip = entries + column / strip_lines * offpath::dx_strip_stride;
            C::store(of_strip, C::interleave_low(a, b));
            C::store(of_strip + offpath::dx_strip_stride, C::interleave_high(a, b));
        };
        if (row < end)
            each_vector_of_chunk<bfloat16>(
                args, row, chunk,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const bfloat16 *values, bool whole) {
                    C::store(first + column, C::expand(values, bits, whole));
                });
        if (row + 1 < end)
            each_vector_of_chunk<bfloat16>(
                args, row + 1, chunk,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const bfloat16 *values, bool whole) {
                    zip(column, C::load(first + column), C::expand(values, bits, whole));
                });
        else
            for (int64_t column = 0; column < offpath::chunk_columns; column += C::entries)
                zip(column, row < end ? C::load(first + column) : C::zero(), C::zero());
    }
};

// Block: rows count chunks, batch counts strips of tokens.
inline void amx_dx(const offpath::amx_dx_args &args, const offpath::Block &block) {
    constexpr int64_t pairs_ahead = 8;
    const int64_t columns = args.bitmap.columns, tiles = tiles_for(args.bitmap.rows);
    const int64_t first_column = block.row_begin * offpath::chunk_columns;
    const int64_t own_columns = (block.row_end - block.row_begin) * offpath::chunk_columns;
    const TileOutput output = {args.dx, args.batch, columns, args.feature_major};
    const TileRegisters registers;
    AmxStep step(tiles);
    do { // without rows, dx is zero
        for (int64_t pair = 0; pair < (step.end - step.begin) * strip_lines; ++pair) {
            const int64_t row = step.begin * tile_depth + 2 * pair;
            RowPair{args, row + 2 * pairs_ahead}.fetch(block.row_begin, block.row_end);
            bfloat16 *entries = args.filled + pair / strip_lines * tile_entries + pair % strip_lines * tile_depth;
            for (int64_t chunk = block.row_begin; chunk < block.row_end; ++chunk) {
                RowPair{args, row}.fill(chunk, entries);
                entries += offpath::chunk_columns / strip_lines * offpath::dx_strip_stride;
            }
        }
        multiply_strips<false>(
            Strips<bfloat16>{args.dy + (block.batch_begin * tiles + step.begin) * tile_entries, tiles * tile_entries,
                             block.batch_end - block.batch_begin},
            Strips<bfloat16>{args.filled, offpath::dx_strip_stride,
                             2 * tiles_for(within(columns - first_column, own_columns))},
            step, args.sums, [](int64_t, float *) { return true; },
            [&](int64_t strip, int64_t strip_of_columns, const float *sums) {
                output.write(sums, (block.batch_begin + strip) * strip_lines,
                             first_column + strip_of_columns * strip_lines);
            });
        step.move_on();
    } while (step.begin < tiles);
}

// Block: rows count strips of rows, batch counts strips of columns.
inline void amx_dvalues(const offpath::amx_dvalues_args &args, const offpath::Block &block) {
    using C = ColumnVector<bfloat16>;
    const offpath::Bitmap &bitmap = args.bitmap;
    const int64_t tiles = tiles_for(args.batch);
    const int64_t first_row = block.row_begin * strip_lines, first_column = block.batch_begin * strip_lines;
    const int64_t rows = within(bitmap.rows - first_row, (block.row_end - block.row_begin) * strip_lines);
    // Where the next value of each row goes, and where those of the block end.
    int64_t slots[offpath::gradient_rows], ends[offpath::gradient_rows];
    for (int64_t i = 0; i < rows; ++i) {
        slots[i] = slots_before_column(bitmap, first_row + i, first_column);
        ends[i] = slots_before_column(bitmap, first_row + i, block.batch_end * strip_lines);
    }
    const TileRegisters registers;
    for (AmxStep step(tiles); step.begin < tiles; step.move_on())
        multiply_strips<false>(
            Strips<bfloat16>{args.dy + (block.row_begin * tiles + step.begin) * tile_entries, tiles * tile_entries,
                             block.row_end - block.row_begin},
            Strips<bfloat16>{args.x + (block.batch_begin * tiles + step.begin) * tile_entries, tiles * tile_entries,
                             block.batch_end - block.batch_begin},
            step, args.sums, [](int64_t, float *) { return true; },
            [&](int64_t strip, int64_t strip_of_columns, const float *sums) {
                const int64_t line = strip * strip_lines, column = first_column + strip_of_columns * strip_lines;
                for (int64_t i = line; i < line + pair_lines && i < rows; ++i, sums += pair_lines) {
                    const int64_t word = (first_row + i) * bitmap.words_per_row + column / 64;
                    const auto bits = static_cast<uint32_t>(bitmap.words[word] >> column % 64);
                    const auto both = C::narrow(Simd<float>::load(sums), Simd<float>::load(sums + strip_lines));
                    // The processor sees no pattern in so many rows.
                    __builtin_prefetch(args.dvalues + slots[i] + 3 * C::columns, 1);
                    if (strip_of_columns == 0 && i + pair_lines < rows)
                        for (int64_t ahead = 0; ahead < 3 * C::columns; ahead += C::columns)
                            __builtin_prefetch(args.dvalues + slots[i + pair_lines] + ahead, 1);
                    // A whole register is written where the slots of the row's block have room for it.
                    C::compress(both, bits, args.dvalues + slots[i], ends[i] - slots[i] >= C::columns);
                    slots[i] += __builtin_popcount(bits);
                }
            });
}

} // namespace
