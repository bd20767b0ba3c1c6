// dX for many tokens where little is missing: as the product of filled-inl.h, but tiles hold some columns of all rows
// of the weight, a chunk, which are read in pieces.
#pragma once

#include "filled-inl.h"

namespace {

constexpr int64_t chunk_rows_ahead = 8;

// Fetches the values of a later row: the processor sees no pattern.
template <class T>
[[gnu::always_inline]] inline void fetch_later_row(const offpath::filled_dx_args<T> &args, int64_t row, int64_t chunk) {
    const int64_t chunks = (args.bitmap.columns + offpath::chunk_columns - 1) / offpath::chunk_columns;
    const int64_t later = row + chunk_rows_ahead < args.bitmap.rows ? row + chunk_rows_ahead : row;
    const T *ahead = args.values + args.chunk_slots[later * chunks + chunk];
#pragma GCC unroll 32
    for (int64_t i = 0; i < offpath::chunk_columns; i += 64 / sizeof(T))
        __builtin_prefetch(ahead + i);
}

// Calls body(column of the chunk, bits, values, whole) for each register full of columns of a chunk of a row.
template <class T, class Args, class Body>
[[gnu::always_inline]] inline void each_vector_of_chunk(const Args &args, int64_t row, int64_t chunk,
                                                        const Body &body) {
    const offpath::Bitmap &bitmap = args.bitmap;
    const int64_t chunks = (bitmap.columns + offpath::chunk_columns - 1) / offpath::chunk_columns;
    const int64_t first_word = chunk * (offpath::chunk_columns / 64);
    const T *end = args.values + bitmap.crow_indices[bitmap.rows];
    const T *values = args.values + args.chunk_slots[row * chunks + chunk];
    for (int64_t w = 0; w < offpath::chunk_columns / 64; ++w) {
        const uint64_t word =
            first_word + w < bitmap.words_per_row ? bitmap.words[row * bitmap.words_per_row + first_word + w] : 0;
        const bool whole = end - values >= 128; // more than a word's values and a register
        each_part_of_word<T>(word, values,
                             [&] [[gnu::always_inline]] (int, int64_t column, uint32_t bits, const T *of_part) {
                                 body(w * 64 + column, bits, of_part, whole);
                             });
        values += __builtin_popcountll(word);
    }
}

// Fills the tile with rows `begin` to `end` of a chunk: [steps of rows, columns of the chunk].
template <class T> void fill_chunk(const offpath::filled_dx_args<T> &args, int64_t chunk, int64_t begin, int64_t end) {
    auto *tile = static_cast<FilledEntry<T> *>(args.tile);
    if constexpr (in_pairs<T>) {
        using B = ColumnVector<T>;
        // The first row of a pair waits here for the second.
        alignas(64) T first[offpath::chunk_columns];
        for (int64_t row = begin; row < end; row += 2) {
            T *entries = tile + (row - begin) * offpath::chunk_columns;
            fetch_later_row<T>(args, row, chunk);
            each_vector_of_chunk<T>(
                args, row, chunk,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                    B::store(first + column, B::order_for_zip(B::expand(values, bits, whole)));
                });
            const auto zip = [&] [[gnu::always_inline]] (int64_t column, typename B::V second) {
                const typename B::V a = B::load(first + column);
                B::store(entries + 2 * column, B::zip_low(a, second));
                B::store(entries + 2 * column + B::entries, B::zip_high(a, second));
            };
            if (row + 1 < end) {
                fetch_later_row<T>(args, row + 1, chunk);
                each_vector_of_chunk<T>(
                    args, row + 1, chunk,
                    [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                        zip(column, B::order_for_zip(B::expand(values, bits, whole)));
                    });
            } else {
                for (int64_t column = 0; column < offpath::chunk_columns; column += B::entries)
                    zip(column, B::zero());
            }
        }
    } else {
        for (int64_t row = begin; row < end; ++row) {
            fetch_later_row<T>(args, row, chunk);
            each_vector_of_chunk<T>(
                args, row, chunk,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                    fill_vector<T>(values, bits, whole, tile + (row - begin) * offpath::chunk_columns + column);
                });
        }
    }
}

// Rows `begin` to `end` of a chunk, which stand in the tile, times a panel of dy. Sums go on from those of the rows
// before; with the last rows they are complete and go to dx.
template <class T, int vectors, bool half>
void multiply_chunk(const offpath::filled_dx_args<T> &args, int64_t chunk, int64_t begin, int64_t end, int64_t token,
                    offpath::Sum<T> *kept) {
    constexpr int64_t groups_per_chunk = offpath::chunk_columns / offpath::group_rows;
    constexpr int64_t step = Format<T>::columns_per_step;
    constexpr int together = groups_together<T, vectors>;
    static_assert(groups_per_chunk % together == 0);
    const int64_t rows = args.bitmap.rows, columns = args.bitmap.columns;
    const int64_t groups = (columns + offpath::group_rows - 1) / offpath::group_rows;
    const int64_t first = chunk * groups_per_chunk;
    const int64_t last = groups < first + groups_per_chunk ? groups : first + groups_per_chunk;
    const auto *tile = static_cast<const FilledEntry<T> *>(args.tile);
    const auto *dy = static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(rows) +
                     begin * width_of_panel<T>(token, args.batch);
    const auto kept_of = [&](int64_t group) { return kept + (group - first) * sums_per_group<T, vectors>; };
    const auto multiply = [&](int64_t group, offpath::Sum<T> *sums) {
        FilledSums<T, vectors> acc;
#pragma GCC unroll 2
        for (int g = 0; g < together; ++g)
            if (begin == 0)
                start_group<T, vectors>(acc[g], GroupStart<T>(nullptr, group + g, columns).of_row);
            else
                load_group<T, vectors>(acc[g], kept_of(group + g));
        multiply_filled<T, vectors, half>(acc, tile + (group - first) * offpath::group_rows * step, step,
                                          offpath::chunk_columns * step, dy, end - begin);
        store_filled<T, vectors>(acc, sums);
    };
    if (end < rows)
        for (int64_t group = first; group < last; group += together)
            multiply(group, kept_of(group));
    else
        each_group<T, vectors, together>({args.dx, columns, args.batch, args.feature_major}, first, last, token,
                                         multiply);
}

// Block: rows count chunks, batch counts panels, of tokens_per_tile at most.
template <class T> void filled_dx(const offpath::filled_dx_args<T> &args, const offpath::Block &block) {
    const int64_t rows = args.bitmap.rows;
    for (int64_t chunk = block.row_begin; chunk < block.row_end; ++chunk) {
        int64_t begin = 0;
        do { // without rows, dx is zero
            const int64_t end = rows - begin < args.rows_per_fill ? rows : begin + args.rows_per_fill;
            fill_chunk<T>(args, chunk, begin, end);
            for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
                const int64_t token = panel * panel_width<T>;
                offpath::Sum<T> *kept =
                    args.sums + (panel - block.batch_begin) * offpath::chunk_columns * panel_width<T>;
                with_halves_of_panel<T>(token, args.batch, [&]<int vectors, bool half>(Vectors<vectors, half>) {
                    multiply_chunk<T, vectors, half>(args, chunk, begin, end, token, kept);
                });
            }
            begin = end;
        } while (begin < rows);
    }
}

} // namespace
