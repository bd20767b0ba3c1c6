// The product for many tokens where little is missing: absent connections are zeros again, but only in tiles of the
// weight that stay in cache. Nothing is sought or sorted, and every loop is that of a dense product: six rows of
// accumulators in registers, a column of the panel (or two) multiplied into all of them.
#pragma once

#include "bitmap_gradients-inl.h"
#include "groups-inl.h"
#include "simd_bytes.h"

namespace {

// What a tile holds; where columns go in pairs, a step takes two neighbouring entries.
template <class T> using FilledEntry = typename Format<T>::Panel;

// Six rows, whose entries lie `row_stride` apart, times what was loaded of a panel.
template <class T, int vectors, bool half>
[[gnu::always_inline]] inline void multiply_group(Accumulators<T, vectors> &acc, const Step<T, vectors> &step,
                                                  const FilledEntry<T> *entries, int64_t row_stride) {
#pragma GCC unroll 8
    for (int row = 0; row < offpath::group_rows; ++row) {
        typename Format<T>::Value value;
        __builtin_memcpy(&value, entries + row * row_stride, sizeof value);
        step.template multiply<half>(value, acc[row]);
    }
}

// The same for the column `column` of a panel (or two, where they go in pairs).
template <class T, int vectors>
[[gnu::always_inline]] inline void multiply_step(Accumulators<T, vectors> &acc, const FilledEntry<T> *entries,
                                                 int64_t row_stride, const typename Format<T>::Panel *panel,
                                                 int32_t column) {
    const int32_t together[] = {column, column + 1};
    Step<T, vectors> step;
    step.load(panel, together);
    multiply_group<T, vectors, false>(acc, step, entries, row_stride);
}

// Groups that are multiplied together: as many as the registers have sums for. A column of a panel serves them all,
// which is what counts where it is multiplied fast and has few tokens.
template <class T> constexpr int most_groups_together = in_pairs<T> || sizeof(typename Simd<float>::V) == 64 ? 2 : 1;
template <class T, int vectors>
constexpr int groups_together = panel_vectors / vectors >= most_groups_together<T> ? most_groups_together<T> : 1;

template <class T, int vectors> using FilledSums = Accumulators<T, vectors>[groups_together<T, vectors>];
template <class T, int vectors>
constexpr int64_t sums_per_group = offpath::group_rows * vectors * Simd<offpath::Sum<T>>::lanes;

// Groups, the rows of which lie `row_stride` apart, times all columns of a panel; the entries of neighbouring steps lie
// `step_stride` apart.
template <class T, int vectors, bool half>
[[gnu::always_inline]] inline void multiply_filled(FilledSums<T, vectors> &acc, const FilledEntry<T> *entries,
                                                   int64_t row_stride, int64_t step_stride,
                                                   const typename Format<T>::Panel *panel, int64_t columns) {
    constexpr int together = groups_together<T, vectors>;
    const FilledEntry<T> *of_group[together];
#pragma GCC unroll 2
    for (int g = 0; g < together; ++g)
        of_group[g] = entries + g * offpath::group_rows * row_stride;
    for (int32_t column = 0; column < columns; column += Format<T>::columns_per_step) {
        const int32_t of_step[] = {column, column + 1};
        Step<T, vectors> step;
        step.load(panel, of_step);
#pragma GCC unroll 2
        for (int g = 0; g < together; ++g) {
            multiply_group<T, vectors, half>(acc[g], step, of_group[g], row_stride);
            of_group[g] += step_stride;
        }
    }
}

template <class T, int vectors>
[[gnu::always_inline]] inline void store_filled(const FilledSums<T, vectors> &acc, offpath::Sum<T> *sums) {
#pragma GCC unroll 2
    for (int g = 0; g < groups_together<T, vectors>; ++g)
        store_group<T, vectors>(acc[g], sums + g * sums_per_group<T, vectors>);
}

// Calls body(Vectors<n, half>) as with_vectors_of_panel does, with `half` where that saves time: a single register of
// single columns is multiplied faster than the tile comes along, as a whole one is.
template <class T, class Body> void with_halves_of_panel(int64_t token, int64_t tokens, const Body &body) {
    with_vectors_of_panel<T>(token, tokens, [&]<int vectors>(Vectors<vectors>) {
        constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes;
        if constexpr (halves_pay && (in_pairs<T> || vectors > 1))
            if (tokens - token <= vectors * lanes - lanes / 2)
                return body(Vectors<vectors, true>());
        body(Vectors<vectors>());
    });
}

// The values of a register full of columns, zeros filled in.
template <class T> void fill_vector(const T *values, uint32_t bits, bool whole, FilledEntry<T> *entries) {
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

// Words of a row of int8 values as numbers that T is multiplied as, zeros filled in; returns where the values of the
// words after them start. Out of line, so that the loops over other values are compiled as they would be without it.
template <class T>
[[gnu::noinline]] const int8_t *fill_int8_words(const offpath::Bitmap &bitmap, int64_t row, int64_t word, int64_t last,
                                                const int8_t *values, FilledEntry<T> *entries) {
    using Word = WidenedWord<T>;
    for (; word < last; ++word, entries += 64) {
        const uint64_t bits = bitmap.words[row * bitmap.words_per_row + word];
        __builtin_prefetch(values + prefetched_bytes);
        const Word widened{spread_bytes(values, bits)};
        values += __builtin_popcountll(bits);
        each_part<64 / Word::columns>([&] [[gnu::always_inline]] (int part) {
            if constexpr (in_pairs<T>)
                ColumnVector<T>::store(entries + part * Word::columns, widened.part(part));
            else
                Word::S::store(entries + part * Word::columns, widened.part(part));
        });
    }
    return values;
}

// Rows of a tile, which are filled some words at a time. Those beyond the matrix are zero.
template <class T> class RowsToFill {
  public:
    RowsToFill(const offpath::filled_args<T> &args, int64_t first_row, int64_t count)
        : args(args), first_row(first_row), count(count) {
        for (int64_t i = 0; i < count; ++i)
            slots[i] = args.bitmap.crow_indices[first_row + i < args.bitmap.rows ? first_row + i : args.bitmap.rows];
    }

    // Fills words `word` to `last` of each row, which are those after the words filled last.
    [[gnu::noinline]] void fill(int64_t word, int64_t last, FilledEntry<T> *entries, int64_t stride) {
        const offpath::Bitmap &bitmap = args.bitmap;
        const auto &weight = args.weight;
        for (int64_t i = 0; i < count; ++i, entries += stride) {
            const int64_t row = first_row + i, slot = slots[i];
            if (row >= bitmap.rows) {
                for (int64_t column = 0; column < (last - word) * 64; ++column)
                    entries[column] = {};
            } else if (weight.int8.scales) {
                const int8_t *values = weight.int8.values;
                slots[i] = fill_int8_words<T>(bitmap, row, word, last, values + slot, entries) - values;
            } else {
                // A whole register of values may be read from where this row's last one starts.
                const bool whole = bitmap.crow_indices[bitmap.rows] - bitmap.crow_indices[row + 1] >= 64;
                // After a piece of a row come those of other rows, not what follows it in memory: the values that are
                // fetched are of the same piece of the rows that are filled next.
                const int64_t next = row + count < bitmap.rows ? row + count : bitmap.rows;
                const int64_t ahead = last - word < bitmap.words_per_row
                                          ? bitmap.crow_indices[next] - bitmap.crow_indices[row]
                                          : prefetched_bytes / sizeof(T);
                slots[i] = each_vector_of_words<T>(
                               bitmap, row, word, last, weight.values + slot,
                               [&] [[gnu::always_inline]] (int, int64_t column, uint32_t bits, const T *values) {
                                   fill_vector<T>(values, bits, whole, entries + column - word * 64);
                               },
                               ahead) -
                           weight.values;
            }
        }
    }

  private:
    const offpath::filled_args<T> &args;
    const int64_t first_row, count;
    int64_t slots[offpath::tile_groups * offpath::group_rows];
};

// Block: rows count groups, batch counts panels.
template <class T> void filled(const offpath::filled_args<T> &args, const offpath::Block &block) {
    constexpr int64_t step = Format<T>::columns_per_step, filled_together = most_groups_together<T>;
    const int64_t rows = args.bitmap.rows, columns = args.bitmap.columns, words = args.bitmap.words_per_row;
    auto *tile = static_cast<FilledEntry<T> *>(args.tile);
    const Output<T> output = {args.y, rows, args.batch, args.feature_major};
    const float *scales = args.weight.int8.scales;
    const T *start = scales ? nullptr : args.bias;
    // Rows that serve a single panel are filled in pieces that stay in the first-level cache until they are multiplied.
    constexpr int64_t most_words = 8;
    const int64_t pieces = words > most_words ? (words + most_words - 1) / most_words : 1;
    const int64_t words_of_piece = (words + pieces - 1) / pieces;
    const int64_t stride_of_piece = args.tile_stride - (words - words_of_piece) * 64;
    const bool by_pieces = block.batch_end - block.batch_begin == 1;
    for (int64_t first = block.row_begin; first < block.row_end; first += offpath::tile_groups) {
        const int64_t last =
            block.row_end - first < offpath::tile_groups ? block.row_end : first + offpath::tile_groups;
        const int64_t groups = (last - first + filled_together - 1) / filled_together * filled_together;
        if (!by_pieces)
            RowsToFill<T>(args, first * offpath::group_rows, groups * offpath::group_rows)
                .fill(0, words, tile, args.tile_stride);
        for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
            const int64_t token = panel * panel_width<T>, width = width_of_panel<T>(token, args.batch);
            const auto *x =
                static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(columns);
            with_halves_of_panel<T>(token, args.batch, [&]<int vectors, bool half>(Vectors<vectors, half>) {
                constexpr int together = groups_together<T, vectors>;
                each_group<T, vectors, together>(output, first, last, token, [&](int64_t group, offpath::Sum<T> *sums) {
                    FilledSums<T, vectors> acc;
#pragma GCC unroll 2
                    for (int g = 0; g < together; ++g)
                        start_group<T, vectors>(acc[g], GroupStart<T>(start, group + g, rows).of_row);
                    if (by_pieces) {
                        RowsToFill<T> piece(args, group * offpath::group_rows, together * offpath::group_rows);
                        for (int64_t word = 0; word < words; word += words_of_piece) {
                            const int64_t end = words - word < words_of_piece ? words : word + words_of_piece;
                            const int64_t left = columns - word * 64;
                            piece.fill(word, end, tile, stride_of_piece);
                            multiply_filled<T, vectors, half>(acc, tile, stride_of_piece, step, x + word * 64 * width,
                                                              left < words_of_piece * 64 ? left : words_of_piece * 64);
                        }
                    } else {
                        multiply_filled<T, vectors, half>(
                            acc, tile + (group - first) * offpath::group_rows * args.tile_stride, args.tile_stride,
                            step, x, columns);
                    }
                    store_filled<T, vectors>(acc, sums);
                    for (int g = 0; scales && g < together; ++g)
                        scale_group<T, vectors>(scales, args.bias, group + g, rows,
                                                sums + g * sums_per_group<T, vectors>);
                });
            });
        }
    }
}

} // namespace
