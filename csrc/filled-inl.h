// Output and dX for many tokens where little is missing: absent connections are zeros again, but only in tiles of the
// weight that stay in cache. Nothing is sought or sorted, and every loop is that of a dense product: six rows of
// accumulators in registers, a column of the panel (or two) multiplied into all of them.
#pragma once

#include "bitmap_gradients-inl.h"
#include "groups-inl.h"

namespace {

// What a tile holds; where columns go in pairs, a step takes two neighbouring entries.
template <class T> using FilledEntry = typename Format<T>::Panel;

// Six rows, whose entries lie `row_stride` apart, times the column `column` of a panel (or two, where they go in
// pairs).
template <class T, int vectors>
[[gnu::always_inline]] inline void multiply_step(Accumulators<T, vectors> &acc, const FilledEntry<T> *entries,
                                                 int64_t row_stride, const typename Format<T>::Panel *panel,
                                                 int32_t column) {
    const int32_t together[] = {column, column + 1};
    Step<T, vectors> step;
    step.load(panel, together);
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row) {
        typename Format<T>::Value value;
        __builtin_memcpy(&value, entries + row * row_stride, sizeof value);
        step.multiply(value, acc[row]);
    }
}

// The same for all columns of a panel; the entries of neighbouring steps lie `step_stride` apart.
template <class T, int vectors>
[[gnu::always_inline]] inline void multiply_filled(Accumulators<T, vectors> &acc, const FilledEntry<T> *entries,
                                                   int64_t row_stride, int64_t step_stride,
                                                   const typename Format<T>::Panel *panel, int64_t columns) {
    for (int32_t column = 0; column < columns; column += Format<T>::columns_per_step) {
        multiply_step<T, vectors>(acc, entries, row_stride, panel, column);
        entries += step_stride;
    }
}

// The values of a register full of columns, zeros filled in.
template <class T> void fill(const T *values, uint32_t bits, bool whole, FilledEntry<T> *entries) {
    if constexpr (in_pairs<T>) {
        using C = ColumnVector<T>;
        C::store(entries, C::expand(values, bits, whole));
    } else {
        using Columns = ColumnSums<T>;
        Columns spread;
        spread.expand(values, bits, whole);
#pragma GCC unroll 4
        for (int i = 0; i < Columns::vectors; ++i)
            Columns::S::store(entries + i * Columns::S::lanes, spread.v[i]);
    }
}

// Block: rows count groups, batch counts panels.
template <class T> void filled(const offpath::filled_args<T> &args, const offpath::Block &block) {
    const int64_t rows = args.bitmap.rows, columns = args.bitmap.columns, width = 64 * args.bitmap.words_per_row;
    auto *tile = static_cast<FilledEntry<T> *>(args.tile);
    const Output<T> output = {args.y, rows, args.batch, args.feature_major};
    for (int64_t first = block.row_begin; first < block.row_end; first += offpath::tile_groups) {
        const int64_t last =
            block.row_end - first < offpath::tile_groups ? block.row_end : first + offpath::tile_groups;
        for (int64_t i = 0; i < (last - first) * offpath::group_rows; ++i) {
            FilledEntry<T> *entries = tile + i * width;
            if (const int64_t row = first * offpath::group_rows + i; row < rows)
                each_column_vector<T>(args.bitmap, row, args.values,
                                      [&](int, int64_t column, uint32_t bits, const T *values, bool whole) {
                                          fill<T>(values, bits, whole, entries + column);
                                      });
            else
                for (int64_t column = 0; column < width; ++column)
                    entries[column] = {};
        }
        for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
            const int64_t token = panel * panel_width<T>;
            const auto *x =
                static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(columns);
            with_vectors_of_panel<T>(token, args.batch, [&]<int vectors>(Vectors<vectors>) {
                each_group<T, vectors>(output, first, last, token, [&](int64_t group, offpath::Sum<T> *sums) {
                    Accumulators<T, vectors> acc;
                    start_group<T, vectors>(acc, GroupStart<T>(args.bias, group, rows).of_row);
                    multiply_filled<T, vectors>(acc, tile + (group - first) * offpath::group_rows * width, width,
                                                Format<T>::columns_per_step, x, columns);
                    store_group<T, vectors>(acc, sums);
                });
            });
        }
    }
}

// The connections of a row before its word `word`.
inline int64_t slots_before(const offpath::Bitmap &bitmap, int64_t row, int64_t word) {
    int64_t slot = bitmap.crow_indices[row];
    for (int64_t w = 0; w < word; ++w)
        slot += __builtin_popcountll(bitmap.words[row * bitmap.words_per_row + w]);
    return slot;
}

constexpr int64_t chunk_rows_ahead = 8;

// Calls body(column of the chunk, bits, values, whole) for each register full of columns of a chunk of a row.
template <class T, class Body>
[[gnu::always_inline]] inline void each_vector_of_chunk(const offpath::Bitmap &bitmap, int64_t row, int64_t first_word,
                                                        const T *values, const Body &body) {
    const T *end = values + bitmap.crow_indices[bitmap.rows];
    const int64_t first_slot = slots_before(bitmap, row, first_word);
    // Where the values of a later row lie, if its connections are spread as this row's: the processor sees no pattern.
    const int64_t later = row + chunk_rows_ahead < bitmap.rows ? row + chunk_rows_ahead : row;
    const T *ahead = values + first_slot + (bitmap.crow_indices[later] - bitmap.crow_indices[row]);
#pragma GCC unroll 32
    for (int64_t i = 0; i < offpath::chunk_columns; i += 64 / sizeof(T))
        __builtin_prefetch(ahead + i);
    values += first_slot;
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
    const int64_t first_word = chunk * (offpath::chunk_columns / 64);
    auto *tile = static_cast<FilledEntry<T> *>(args.tile);
    if constexpr (in_pairs<T>) {
        using B = ColumnVector<T>;
        // The first row of a pair waits here for the second.
        alignas(64) T first[offpath::chunk_columns];
        for (int64_t row = begin; row < end; row += 2) {
            T *entries = tile + (row - begin) * offpath::chunk_columns;
            each_vector_of_chunk<T>(
                args.bitmap, row, first_word, args.values,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                    B::store(first + column, B::order_for_zip(B::expand(values, bits, whole)));
                });
            const auto zip = [&] [[gnu::always_inline]] (int64_t column, typename B::V second) {
                const typename B::V a = B::load(first + column);
                B::store(entries + 2 * column, B::zip_low(a, second));
                B::store(entries + 2 * column + B::entries, B::zip_high(a, second));
            };
            if (row + 1 < end)
                each_vector_of_chunk<T>(
                    args.bitmap, row + 1, first_word, args.values,
                    [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                        zip(column, B::order_for_zip(B::expand(values, bits, whole)));
                    });
            else
                for (int64_t column = 0; column < offpath::chunk_columns; column += B::entries)
                    zip(column, B::zero());
        }
    } else {
        for (int64_t row = begin; row < end; ++row)
            each_vector_of_chunk<T>(
                args.bitmap, row, first_word, args.values,
                [&] [[gnu::always_inline]] (int64_t column, uint32_t bits, const T *values, bool whole) {
                    fill<T>(values, bits, whole, tile + (row - begin) * offpath::chunk_columns + column);
                });
    }
}

// Rows `begin` to `end` of a chunk, which stand in the tile, times a panel of dy. Sums go on from those of the rows
// before; with the last rows they are complete and go to dx.
template <class T, int vectors>
void multiply_chunk(const offpath::filled_dx_args<T> &args, int64_t chunk, int64_t begin, int64_t end, int64_t token,
                    offpath::Sum<T> *kept) {
    constexpr int64_t groups_per_chunk = offpath::chunk_columns / offpath::group_rows;
    constexpr int64_t step = Format<T>::columns_per_step;
    constexpr int64_t group_sums = offpath::group_rows * vectors * Simd<offpath::Sum<T>>::lanes;
    const int64_t rows = args.bitmap.rows, columns = args.bitmap.columns;
    const int64_t groups = (columns + offpath::group_rows - 1) / offpath::group_rows;
    const int64_t first = chunk * groups_per_chunk;
    const int64_t last = groups < first + groups_per_chunk ? groups : first + groups_per_chunk;
    const auto *tile = static_cast<const FilledEntry<T> *>(args.tile);
    const auto *dy = static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(rows) +
                     begin * width_of_panel<T>(token, args.batch);
    const auto multiply = [&](int64_t group, offpath::Sum<T> *sums) {
        Accumulators<T, vectors> acc;
        if (begin == 0)
            start_group<T, vectors>(acc, GroupStart<T>(nullptr, group, columns).of_row);
        else
            load_group<T, vectors>(acc, kept + (group - first) * group_sums);
        multiply_filled<T, vectors>(acc, tile + (group - first) * offpath::group_rows * step, step,
                                    offpath::chunk_columns * step, dy, end - begin);
        store_group<T, vectors>(acc, sums);
    };
    if (end < rows)
        for (int64_t group = first; group < last; ++group)
            multiply(group, kept + (group - first) * group_sums);
    else
        each_group<T, vectors>({args.dx, columns, args.batch, args.feature_major}, first, last, token, multiply);
}

// Block: rows count chunks, batch counts panels, of tokens_per_tile at most.
template <class T> void filled_dx(const offpath::filled_dx_args<T> &args, const offpath::Block &block) {
    constexpr int64_t rows_at_once = offpath::rows_per_fill(sizeof(FilledEntry<T>));
    const int64_t rows = args.bitmap.rows;
    for (int64_t chunk = block.row_begin; chunk < block.row_end; ++chunk) {
        int64_t begin = 0;
        do { // without rows, dx is zero
            const int64_t end = rows - begin < rows_at_once ? rows : begin + rows_at_once;
            fill_chunk<T>(args, chunk, begin, end);
            for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
                const int64_t token = panel * panel_width<T>;
                offpath::Sum<T> *kept =
                    args.sums + (panel - block.batch_begin) * offpath::chunk_columns * panel_width<T>;
                with_vectors_of_panel<T>(token, args.batch, [&]<int vectors>(Vectors<vectors>) {
                    multiply_chunk<T, vectors>(args, chunk, begin, end, token, kept);
                });
            }
            begin = end;
        } while (begin < rows);
    }
}

} // namespace
