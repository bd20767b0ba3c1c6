// Products over a matrix of bits: the values of a row stand side by side in memory as the caller has them, and the
// bits say into which lanes they are spread. For a few tokens this reads fewer bytes than any list of columns from
// about 6 % of connections on; the same bits write the weight out dense and pick the entries of a dense gradient.
#pragma once

#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// One register of neighbouring columns.
template <class T> struct ColumnVector {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int columns = S::lanes;
    using V = typename S::V;
    static V load(const T *p) { return S::load_first(p, columns); }
    static V load_where(const T *p, uint32_t bits) { return S::keep_where(load(p), bits); }
    static V expand(const T *packed, uint32_t bits, bool whole) { return S::expand(packed, bits, whole); }
    static void store_first(T *p, V a, int64_t n) { S::store_first(p, a, n); }
    static void compress(const T *spread, uint32_t bits, T *packed, bool whole) {
        S::compress(spread, bits, packed, whole);
    }
    static typename S::V multiply_add(V a, V b, typename S::V sum) { return S::fma(a, b, sum); }
};

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct ColumnVector<bfloat16> : BfloatPairs {
    static constexpr int columns = entries;
    static Simd<float>::V multiply_add(V a, V b, Simd<float>::V sum) { return dot(a, b, sum); }
};
#endif

// Calls body(0) ... body(n - 1): written out where that is little code. Sixteen parts and more, of narrow registers,
// took the compiler longer than all else; on AArch64, eight had it load so far ahead that no register was left for
// sums.
#if defined(__aarch64__)
constexpr int written_out_parts = 4;
#else
constexpr int written_out_parts = 8;
#endif
template <int n, class Body> [[gnu::always_inline]] inline void each_part(const Body &body) {
    if constexpr (n <= written_out_parts)
#pragma GCC unroll 8
        for (int part = 0; part < n; ++part)
            body(part);
    else
        for (int part = 0; part < n; ++part)
            body(part);
}

// Calls body(part of the word, its first column in the word, bits, values of these columns) for each register full of
// columns of a word.
template <class T, class Value, class Body>
[[gnu::always_inline]] inline void each_part_of_word(uint64_t word, Value *values, const Body &body) {
    constexpr int columns = ColumnVector<T>::columns;
    each_part<64 / columns>([&] [[gnu::always_inline]] (int part) {
        // Counted from the start of the word, so that the parts do not wait for one another.
        const uint64_t before = word & ((uint64_t{1} << part * columns) - 1);
        const uint32_t bits = static_cast<uint32_t>(word >> part * columns & ((uint64_t{1} << columns) - 1));
        body(part, part * columns, bits, values + __builtin_popcountll(before));
    });
}

template <class Value> constexpr bool is_written = true;
template <class Value> constexpr bool is_written<const Value> = false;

// Fetches, some parts ahead of one, a cache line of values: no more than a part has.
template <class T, class Value>
[[gnu::always_inline]] inline void fetch_ahead(int part, Value *of_part,
                                               int64_t ahead = prefetched_bytes / sizeof(Value)) {
    if (part * ColumnVector<T>::columns * sizeof(Value) % 64 == 0)
        __builtin_prefetch(of_part + ahead, is_written<Value>);
}

// Calls body(part of the word, first column, bits, values of these columns) for each register full of columns of some
// words of a row, whose values start at `values`; returns where those of the words after them do. Values are fetched
// `ahead` of their use.
template <class T, class Value, class Body>
[[gnu::always_inline]] inline Value *each_vector_of_words(const offpath::Bitmap &bitmap, int64_t row, int64_t word,
                                                          int64_t last, Value *values, const Body &body,
                                                          int64_t ahead = prefetched_bytes / sizeof(Value)) {
    for (const uint64_t *words = bitmap.words + row * bitmap.words_per_row; word < last; ++word) {
        each_part_of_word<T>(words[word], values,
                             [&] [[gnu::always_inline]] (int part, int64_t column, uint32_t bits, Value *of_part) {
                                 fetch_ahead<T>(part, of_part, ahead);
                                 body(part, word * 64 + column, bits, of_part);
                             });
        values += __builtin_popcountll(words[word]);
    }
    return values;
}

// Calls body(part of the word, first column, bits, values of these columns, whether a whole register of values may be
// read) for each register full of columns of a row.
template <class T, class Value, class Body>
[[gnu::always_inline]] inline void each_column_vector(const offpath::Bitmap &bitmap, int64_t row, Value *values,
                                                      const Body &body) {
    const Value *end = values + bitmap.crow_indices[bitmap.rows];
    values += bitmap.crow_indices[row];
    const bool whole = end - values >= bitmap.crow_indices[row + 1] - bitmap.crow_indices[row] + 64;
    each_vector_of_words<T>(bitmap, row, 0, bitmap.words_per_row, values,
                            [&] [[gnu::always_inline]] (int part, int64_t column, uint32_t bits, Value *of_part) {
                                body(part, column, bits, of_part, whole);
                            });
}

// Calls body(part of the word, first column, bits of each row, values of each row) for each register full of columns
// of some words of rows that lie `apart`, and moves `values` on to the words after them. Rows that were neighbours
// would each be followed in memory by one that is read at the same time; so each goes on with the row that is read
// next, and neither fetching ahead nor the processor's own is in vain.
template <class T, int rows, class Value, class Body>
[[gnu::always_inline]] inline void each_part_of_rows(const offpath::Bitmap &bitmap, int64_t row, int64_t apart,
                                                     int64_t word, int64_t last, Value **values, const Body &body) {
    constexpr int columns = ColumnVector<T>::columns;
    const uint64_t *words = bitmap.words + row * bitmap.words_per_row;
    const int64_t words_apart = apart * bitmap.words_per_row;
    for (; word < last; ++word) {
        uint64_t of_row[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
            of_row[r] = words[r * words_apart + word];
        each_part<64 / columns>([&] [[gnu::always_inline]] (int part) {
            uint32_t bits[rows];
            Value *at[rows];
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                bits[r] = static_cast<uint32_t>(of_row[r] >> part * columns & ((uint64_t{1} << columns) - 1));
                at[r] = values[r] + __builtin_popcountll(of_row[r] & ((uint64_t{1} << part * columns) - 1));
                fetch_ahead<T>(part, at[r]);
            }
            body(part, word * 64 + part * columns, bits, at);
        });
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
            values[r] += __builtin_popcountll(of_row[r]);
    }
}

// Neighbouring rows that are multiplied together, so that what is loaded of x serves all of them: as many as there are
// registers for, beside those of what is multiplied. AVX-512 takes x from memory and spreads values without a table.
constexpr int bitmap_sums = sizeof(Simd<float>::V) == 64 ? 24 : vector_registers / 2;
template <int tokens>
constexpr int bitmap_rows_together = 4 * tokens <= bitmap_sums   ? 4
                                     : 2 * tokens <= bitmap_sums ? 2
                                                                 : 1;

// With few tokens, several sums take turns, so that no addition waits for the one before it.
template <class T, int tokens>
constexpr int bitmap_turns = tokens <= 2 && 64 / ColumnVector<T>::columns <= 4 ? 64 / ColumnVector<T>::columns : 1;

template <class T, int tokens, bool finite, int rows>
[[gnu::always_inline]] inline void bitmap_some_rows(const offpath::bitmap_args<T> &args, int64_t row, int64_t apart) {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    constexpr int turns = bitmap_turns<T, tokens>;
    const offpath::Bitmap &bitmap = args.bitmap;
    const int64_t width = 64 * bitmap.words_per_row;
    typename S::V acc[rows][turns][tokens];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < turns; ++i)
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
                acc[r][i][t] = S::zero();
    const T *values[rows];
    for (int r = 0; r < rows; ++r)
        values[r] = args.values + bitmap.crow_indices[row + r * apart];
    const bool whole =
        bitmap.crow_indices[bitmap.rows] - bitmap.crow_indices[row + (rows - 1) * apart + 1] >= C::columns;
    each_part_of_rows<T, rows>(
        bitmap, row, apart, 0, bitmap.words_per_row, values,
        [&] [[gnu::always_inline]] (int part, int64_t column, const uint32_t (&bits)[rows], const T *const(&at)[rows]) {
            typename C::V spread[rows];
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r)
                spread[r] = C::expand(at[r], bits[r], whole);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t) {
                const T *x = args.x + t * width + column;
                if constexpr (finite) {
                    const typename C::V of_columns = C::load(x);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; ++r) {
                        auto &sum = acc[r][part % turns][t];
                        sum = C::multiply_add(spread[r], of_columns, sum);
                    }
                } else { // masked where an infinite input would meet a missing weight's zero
                    for (int r = 0; r < rows; ++r) {
                        auto &sum = acc[r][part % turns][t];
                        sum = C::multiply_add(spread[r], C::load_where(x, bits[r]), sum);
                    }
                }
            }
        });
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int i = 1; i < turns; ++i)
#pragma GCC unroll 8
            for (int t = 0; t < tokens; ++t)
                acc[r][0][t] = S::add(acc[r][0][t], acc[r][i][t]);
        typename S::V totals[S::lanes];
#pragma GCC unroll 4
        for (int first = 0; first < tokens; first += S::lanes) {
#pragma GCC unroll 16
            for (int i = 0; i < S::lanes; ++i)
                totals[i] = first + i < tokens ? acc[r][0][first + i] : S::zero();
            offpath::Sum<T> sums[S::lanes];
            S::store(sums, sum_each<offpath::Sum<T>>(totals));
            for (int i = 0; i < S::lanes && first + i < tokens; ++i) {
                const offpath::Sum<T> y = sums[i] + (args.bias ? compute(args.bias[row + r * apart]) : 0);
                S::store_first(args.y + (first + i) * bitmap.rows + row + r * apart, S::set1(y), 1);
            }
        }
    }
}

template <class T, int tokens, bool finite>
void bitmap_rows(const offpath::bitmap_args<T> &args, const offpath::Block &block) {
    constexpr int together = finite ? bitmap_rows_together<tokens> : 1;
    const int64_t apart = (block.row_end - block.row_begin) / together;
    for (int64_t i = 0; i < apart; ++i)
        bitmap_some_rows<T, tokens, finite, together>(args, block.row_begin + i, apart);
    if constexpr (together > 1)
        for (int64_t row = block.row_begin + apart * together; row < block.row_end; ++row)
            bitmap_some_rows<T, tokens, finite, 1>(args, row, 1);
}

template <class T> void bitmap(const offpath::bitmap_args<T> &args, const offpath::Block &block) {
    if (!args.x_is_finite)
        return bitmap_rows<T, 1, false>(args, block);
    switch (args.batch) {
    case 1:
        return bitmap_rows<T, 1, true>(args, block);
    case 2:
        return bitmap_rows<T, 2, true>(args, block);
    case 3:
        return bitmap_rows<T, 3, true>(args, block);
    case 4:
        return bitmap_rows<T, 4, true>(args, block);
    case 5:
        return bitmap_rows<T, 5, true>(args, block);
    case 6:
        return bitmap_rows<T, 6, true>(args, block);
    case 7:
        return bitmap_rows<T, 7, true>(args, block);
    case 8:
        return bitmap_rows<T, 8, true>(args, block);
    }
}

template <class T> void expand(const offpath::expand_args<T> &args, const offpath::Block &block) {
    using C = ColumnVector<T>;
    const int64_t columns = args.bitmap.columns;
    for (int64_t row = block.row_begin; row < block.row_end; ++row)
        each_column_vector<T>(
            args.bitmap, row, args.values, [&](int, int64_t column, uint32_t bits, const T *values, bool whole) {
                const int64_t n = columns - column < C::columns ? columns - column : C::columns;
                if (n > 0)
                    C::store_first(args.dense + row * columns + column, C::expand(values, bits, whole), n);
            });
}

// Whether a whole register may be written where the values of a row of the block end: what is too much there is written
// anew with the rows after it.
template <class T> bool may_spill(const offpath::Bitmap &bitmap, const offpath::Block &block, int64_t row) {
    return bitmap.crow_indices[block.row_end] - bitmap.crow_indices[row + 1] >= ColumnVector<T>::columns;
}

template <class T> void compress(const offpath::compress_args<T> &args, const offpath::Block &block) {
    using C = ColumnVector<T>;
    const int64_t columns = args.bitmap.columns;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const bool whole = may_spill<T>(args.bitmap, block, row);
        each_column_vector<T>(args.bitmap, row, args.values, [&](int, int64_t column, uint32_t bits, T *values, bool) {
            if (columns - column >= C::columns)
                C::compress(args.dense + row * columns + column, bits, values, whole);
            else // the last register would be read beyond the row
                for (int c = 0; c < C::columns && bits >> c; ++c)
                    if (bits >> c & 1)
                        *values++ = args.dense[row * columns + column + c];
        });
    }
}

} // namespace
