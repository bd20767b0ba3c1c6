// The weight gradient for many tokens where little is missing: computed at every position, six rows times a panel of
// columns in registers; the bits pick what is wanted.
#pragma once

#include "filled-inl.h"

namespace {

// Tokens after which the next group has its turn, so that they stay in cache: whole panels.
constexpr int64_t tokens_at_once = 256;

// Adds tokens `begin` to `end` to the sums of a group's positions in one panel of x.
template <class T, int vectors>
[[gnu::always_inline]] inline void filled_positions(const offpath::filled_dvalues_args<T> &args, int64_t group,
                                                    const typename Format<T>::Panel *panel, int64_t begin, int64_t end,
                                                    Accumulators<T, vectors> &acc) {
    constexpr int64_t steps = Format<T>::granule / Format<T>::columns_per_step;
    const int64_t rows = args.bitmap.rows;
    for (int64_t token = begin; token < end; token += panel_width<T>) {
        const int64_t left = args.batch - token, width = width_of_panel<T>(token, args.batch);
        const auto *dy = static_cast<const typename Format<T>::Panel *>(args.dy) + token * panel_columns<T>(rows) +
                         group * offpath::group_rows * width;
        const auto multiply = [&] [[gnu::always_inline]] (int64_t width, int64_t tokens) {
            for (int64_t t = 0; t < width; t += Format<T>::granule)
                for (int64_t i = 0; i < steps; ++i)
                    if (const int64_t first = t + token_of_step<T>(i); first < tokens) // the rest is padding
                        multiply_step<T, vectors>(acc, dy + t + i * Format<T>::columns_per_step, width, panel,
                                                  static_cast<int32_t>(token + first));
        };
        if (left >= panel_width<T>) // a width that is known saves addresses
            multiply(panel_width<T>, panel_width<T>);
        else
            multiply(width, left);
    }
}

// Writes the connections' entries of a group's sums in the panel that starts at `column`, each row's from its slot on.
// A whole register is written where the slots of the row's block have room for it: what is too much is written anew.
// A function of its own: GCC 12 keeps constants of rounding in a register across loops, and a sum in memory instead.
template <class T, int64_t width>
[[gnu::noinline]] void pick_connections(const offpath::filled_dvalues_args<T> &args, int64_t group, int64_t column,
                                        const offpath::Sum<T> *sums, int64_t *slots, const int64_t *ends) {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    const int64_t first_row = group * offpath::group_rows;
    for (int64_t i = 0; i < offpath::group_rows && first_row + i < args.bitmap.rows; ++i) {
        const int64_t at = (first_row + i) * args.bitmap.words_per_row + column / 64;
        const uint64_t word = args.bitmap.words[at] >> column % 64;
        int64_t slot = slots[i];
        for (int64_t part = 0; part < width; part += C::columns) {
            const uint32_t bits = static_cast<uint32_t>(word >> part & ((uint64_t{1} << C::columns) - 1));
            ColumnSums<T> of_part;
            for (int v = 0; v < ColumnSums<T>::vectors; ++v) {
                const int64_t first = part + v * S::lanes;
                of_part.v[v] = first < width ? S::load(sums + i * width + first) : S::zero();
            }
            of_part.compress(bits, args.dvalues + slot, ends[i] - slot >= C::columns);
            slot += __builtin_popcount(bits);
        }
        slots[i] = slot;
    }
}

// The connections of a row before its word `word`.
inline int64_t slots_before(const offpath::Bitmap &bitmap, int64_t row, int64_t word) {
    int64_t slot = bitmap.crow_indices[row];
    for (int64_t w = 0; w < word; ++w)
        slot += __builtin_popcountll(bitmap.words[row * bitmap.words_per_row + w]);
    return slot;
}

// The connections of a row before its column `column`.
inline int64_t slots_before_column(const offpath::Bitmap &bitmap, int64_t row, int64_t column) {
    const int64_t word = column / 64;
    if (word >= bitmap.words_per_row)
        return bitmap.crow_indices[row + 1];
    const uint64_t before = bitmap.words[row * bitmap.words_per_row + word] & ((uint64_t{1} << column % 64) - 1);
    return slots_before(bitmap, row, word) + __builtin_popcountll(before);
}

// The lines that a group's connections of the panel will be written to: no pattern that the processor sees, since a
// panel's part of a row is less than a line or two.
template <class T>
[[gnu::always_inline]] inline void prefetch_connections(const offpath::filled_dvalues_args<T> &args,
                                                        const int64_t *slots) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < offpath::group_rows; ++i) {
        __builtin_prefetch(args.dvalues + slots[i], 1);
        __builtin_prefetch(args.dvalues + slots[i] + 64 / sizeof(T), 1);
    }
}

// Block: rows count groups, batch counts panels of x.
template <class T> void filled_dvalues(const offpath::filled_dvalues_args<T> &args, const offpath::Block &block) {
    const offpath::Bitmap &bitmap = args.bitmap;
    const int64_t first_row = block.row_begin * offpath::group_rows;
    const int64_t last_row =
        block.row_end * offpath::group_rows < bitmap.rows ? block.row_end * offpath::group_rows : bitmap.rows;
    const int64_t first_column = block.batch_begin * panel_width<T>;
    const int64_t last_column = block.batch_end * panel_width<T>;
    // Where the next value of each row goes, and where those of the block end. Rows that the last group lacks are
    // fetched with it, from the first slot.
    constexpr int64_t most_rows = offpath::groups_per_gradient * offpath::group_rows;
    int64_t slots[most_rows] = {}, ends[most_rows];
    for (int64_t row = first_row; row < last_row; ++row) {
        slots[row - first_row] = slots_before_column(bitmap, row, first_column);
        ends[row - first_row] = slots_before_column(bitmap, row, last_column);
    }
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t column = panel * panel_width<T>;
        const auto *x = static_cast<const typename Format<T>::Panel *>(args.x) + column * panel_columns<T>(args.batch);
        with_vectors_of_panel<T>(column, bitmap.columns, [&]<int vectors>(Vectors<vectors>) {
            constexpr int64_t width = vectors * Simd<offpath::Sum<T>>::lanes;
            alignas(64) offpath::Sum<T> kept[offpath::groups_per_gradient][offpath::group_rows * width];
            for (int64_t begin = 0; begin < args.batch; begin += tokens_at_once) {
                const int64_t end = args.batch - begin < tokens_at_once ? args.batch : begin + tokens_at_once;
                for (int64_t group = block.row_begin; group < block.row_end; ++group) {
                    offpath::Sum<T> *sums = kept[group - block.row_begin];
                    if (end == args.batch && group + 1 < block.row_end)
                        prefetch_connections<T>(args, slots + (group + 1 - block.row_begin) * offpath::group_rows);
                    Accumulators<T, vectors> acc;
                    if (begin == 0)
                        start_group<T, vectors>(acc, GroupStart<T>(nullptr, group, bitmap.rows).of_row);
                    else
                        load_group<T, vectors>(acc, sums);
                    filled_positions<T, vectors>(args, group, x, begin, end, acc);
                    store_group<T, vectors>(acc, sums);
                    if (end == args.batch) {
                        const int64_t row = (group - block.row_begin) * offpath::group_rows;
                        pick_connections<T, width>(args, group, column, sums, slots + row, ends + row);
                    }
                }
            }
        });
    }
}

} // namespace
