// Rows of the weight, written out as the left factor of a product on AMX: a word of columns is a line of a tile of
// int8, or of two tiles of bfloat16.
#pragma once

#include "amx-inl.h"
#include "simd_bytes.h"

namespace {

// A word of columns in the registers of a line of each of its tiles, `of_word`.
[[gnu::always_inline]] inline void store_word(uint64_t word, const bfloat16 *values, const bfloat16 *end,
                                              bfloat16 *of_word) {
    using C = ColumnVector<bfloat16>;
    const bool whole = end - values >= 128; // more than a word's values and a register
    each_part_of_word<bfloat16>(word, values,
                                [&] [[gnu::always_inline]] (int part, int64_t, uint32_t bits, const bfloat16 *of_part) {
                                    C::store(of_word + part * tile_entries, C::expand(of_part, bits, whole));
                                });
}
[[gnu::always_inline]] inline void store_word(uint64_t word, const int8_t *values, const int8_t *, bfloat16 *of_word) {
    const WidenedWord<bfloat16> widened{spread_bytes(values, word)};
    ColumnVector<bfloat16>::store(of_word, widened.part(0));
    ColumnVector<bfloat16>::store(of_word + tile_entries, widened.part(1));
}
[[gnu::always_inline]] inline void store_word(uint64_t word, const int8_t *values, const int8_t *, int8_t *of_word) {
    const SpreadBytes spread = spread_bytes(values, word);
    __builtin_memcpy(of_word, &spread, 64);
}

// What is left of the rows of a block, whose values become entries of tiles.
template <class Value, class Entry> struct UnreadRows {
    const offpath::Bitmap &bitmap;
    const int64_t first_row, count;         // with those beyond the weight, which are zeros
    const Value *const end;                 // of all values
    const Value *values[offpath::amx_rows]; // of each row
    int64_t lines_ahead;                    // of values that a step takes of a row

    UnreadRows(const offpath::Bitmap &bitmap, const Value *of_weight, int64_t first_row, int64_t count, int64_t tiles)
        : bitmap(bitmap), first_row(first_row), count(count), end(of_weight + bitmap.crow_indices[bitmap.rows]) {
        for (int64_t i = 0; i < count; ++i)
            values[i] = of_weight + bitmap.crow_indices[row_of(i)];
        // A piece begins anywhere in a line, and the register that reads its end goes beyond.
        const int64_t nnz = bitmap.crow_indices[row_of(count)] - bitmap.crow_indices[first_row];
        lines_ahead = nnz * offpath::tiles_per_step / (count * (tiles + 1) * entries_of_line) + 3;
        for (int64_t i = 0; i < rows_ahead && i < count; ++i)
            fetch(i, 0);
    }

    // Writes a step of them, [strips][tiles of the step], and zeros up to where the last word ends.
    void fill(const AmxStep &step, Entry *filled) {
        constexpr int64_t line = offpath::entries_of_tile<Entry> / strip_lines, tiles_of_word = 64 / line;
        const int64_t first_word = step.begin / tiles_of_word;
        const int64_t words = (step.end - step.begin + tiles_of_word - 1) / tiles_of_word;
        constexpr int64_t of_word = tiles_of_word * offpath::entries_of_tile<Entry>;
        for (int64_t i = 0; i < count; ++i) {
            if (const int64_t later = i + rows_ahead; later < count)
                fetch(later, first_word);
            else
                fetch(later - count, first_word + words);
            Entry *entries = filled + i / strip_lines * words * of_word + i % strip_lines * line;
            if (first_row + i >= bitmap.rows) {
                for (int64_t w = 0; w < words; ++w)
                    store_word(0, values[i], end, entries + w * of_word);
                continue;
            }
            const Value *of_row = values[i];
            const uint64_t *bits_of_row = bitmap.words + (first_row + i) * bitmap.words_per_row + first_word;
            for (int64_t w = 0; w < words; ++w) {
                store_word(bits_of_row[w], of_row, end, entries + w * of_word);
                of_row += __builtin_popcountll(bits_of_row[w]);
            }
            values[i] = of_row;
        }
    }

  private:
    // The processor sees no pattern in short pieces of many rows.
    static constexpr int64_t rows_ahead = 16, entries_of_line = 64 / sizeof(Value);

    int64_t row_of(int64_t i) const { return first_row + i < bitmap.rows ? first_row + i : bitmap.rows; }
    void fetch(int64_t i, int64_t word) const {
        for (int64_t line = 0; line < lines_ahead; ++line)
            __builtin_prefetch(values[i] + line * entries_of_line);
        __builtin_prefetch(bitmap.words + (first_row + i) * bitmap.words_per_row + word);
    }
};

} // namespace
