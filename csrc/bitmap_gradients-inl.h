// The gradients of a layer for a few tokens, over the same bits and values as its forward product: each row of the
// weight is read once, as it lies in memory.
#pragma once

#include "bitmap-inl.h"

namespace {

// A register full of columns of T as it is summed.
template <class T> struct ColumnSums {
    using S = Simd<offpath::Sum<T>>;
    using C = ColumnVector<T>;
    static constexpr int vectors = 1;
    typename S::V v[vectors];

    [[gnu::always_inline]] void expand(const T *values, uint32_t bits, bool whole) {
        v[0] = C::expand(values, bits, whole);
    }
    // Rounds them and writes those of the connections side by side.
    [[gnu::always_inline]] void compress(uint32_t bits, T *packed, bool whole) const {
        S::store_first(packed, S::move_together(v[0], bits), whole ? S::lanes : __builtin_popcount(bits));
    }
};

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct ColumnSums<bfloat16> {
    using S = Simd<float>;
    using C = ColumnVector<bfloat16>;
    static constexpr int vectors = 2;
    S::V v[vectors];

    [[gnu::always_inline]] void expand(const bfloat16 *values, uint32_t bits, bool whole) {
        const C::V spread = C::expand(values, bits, whole);
        v[0] = C::widen_low(spread);
        v[1] = C::widen_high(spread);
    }
    [[gnu::always_inline]] void compress(uint32_t bits, bfloat16 *packed, bool whole) const {
        C::compress(C::narrow(v[0], v[1]), bits, packed, whole);
    }
};
#endif

// Rows that are read together, so that sums are loaded and stored, and activations loaded, once for all.
#if defined(__AVX512F__)
constexpr int dx_rows_together = 8, dvalues_rows_together = 4;
#else
constexpr int dx_rows_together = 4, dvalues_rows_together = 2;
#endif
// Rows that are gone through strip by strip, and what a strip's activations or sums may take of the second-level cache.
// Strips that fit into the first one break the streams in which rows are read: those of a weight in memory took up to
// three times as long.
constexpr int64_t rows_of_strip = 64, strip_bytes = 128 << 10;

// Calls body.template operator()<rows>(first row, how far apart they are, first word, last word, where each row's
// values of these words start) for strips of a block's rows, `rows` being `together` or one. `body` moves on each row's
// values.
template <int together, class Value, class Body>
[[gnu::always_inline]] inline void each_strip(const offpath::Bitmap &bitmap, const offpath::Block &block,
                                              int64_t bytes_per_column, Value *values, const Body &body) {
    const int64_t fitting = strip_bytes / (64 * bytes_per_column), words_of_strip = fitting > 1 ? fitting : 1;
    for (int64_t first = block.row_begin; first < block.row_end; first += rows_of_strip) {
        const int64_t rows = block.row_end - first < rows_of_strip ? block.row_end - first : rows_of_strip;
        Value *of_row[rows_of_strip];
        for (int64_t i = 0; i < rows; ++i)
            of_row[i] = values + bitmap.crow_indices[first + i];
        for (int64_t word = 0; word < bitmap.words_per_row; word += words_of_strip) {
            const int64_t left = bitmap.words_per_row - word;
            const int64_t last = word + (left < words_of_strip ? left : words_of_strip);
            const int64_t apart = rows / together;
            for (int64_t i = 0; i < apart; ++i) {
                Value *of_rows[together];
                for (int r = 0; r < together; ++r)
                    of_rows[r] = of_row[i + r * apart];
                body.template operator()<together>(first + i, apart, word, last, of_rows);
                for (int r = 0; r < together; ++r)
                    of_row[i + r * apart] = of_rows[r];
            }
            for (int64_t i = apart * together; i < rows; ++i)
                body.template operator()<1>(first + i, 1, word, last, of_row + i);
        }
    }
}

// A register full of columns of some rows, to be multiplied with a token's dy of these rows.
template <class T, int rows, bool finite> struct RowsOfColumns {
    using S = Simd<offpath::Sum<T>>;
    ColumnSums<T> row[rows];

    [[gnu::always_inline]] void expand(const T *const (&values)[rows], const uint32_t (&bits)[rows], bool whole) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
            row[r].expand(values[r], bits[r], whole);
    }
    [[gnu::always_inline]] typename S::V add(int vector, const Multiplied<T> *dy, const uint32_t (&bits)[rows],
                                             typename S::V sum) const {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const typename S::V of_row = S::set1(compute(dy[r]));
            if constexpr (finite)
                sum = S::fma(of_row, row[r].v[vector], sum);
            else // an infinite gradient would meet a missing weight's zero
                sum = S::add(S::keep_where(S::fma(of_row, row[r].v[vector], S::zero()), bits[r] >> vector * S::lanes),
                             sum);
        }
        return sum;
    }
};

#ifdef OFFPATH_BFLOAT_PAIRS
// Neighbouring rows are multiplied in pairs.
template <int rows>
    requires(rows % 2 == 0)
struct RowsOfColumns<bfloat16, rows, true> {
    using B = BfloatPairs;
    B::V pair[rows / 2][2];

    [[gnu::always_inline]] void expand(const bfloat16 *const (&values)[rows], const uint32_t (&bits)[rows],
                                       bool whole) {
#pragma GCC unroll 4
        for (int p = 0; p < rows / 2; ++p) {
            const B::V first = B::expand(values[2 * p], bits[2 * p], whole);
            const B::V second = B::expand(values[2 * p + 1], bits[2 * p + 1], whole);
            pair[p][0] = B::interleave_low(first, second);
            pair[p][1] = B::interleave_high(first, second);
        }
    }
    [[gnu::always_inline]] Simd<float>::V add(int vector, const bfloat16 *dy, const uint32_t (&)[rows],
                                              Simd<float>::V sum) const {
#pragma GCC unroll 4
        for (int p = 0; p < rows / 2; ++p)
            sum = B::dot(pair[p][vector], B::set1(B::pair_at(dy + 2 * p)), sum);
        return sum;
    }
};
#endif

template <class T, bool finite>
void bitmap_dx_rows(const offpath::bitmap_dx_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    const offpath::Bitmap &bitmap = args.bitmap;
    const auto *dy = static_cast<const Multiplied<T> *>(args.dy);
    const int64_t nnz = bitmap.crow_indices[bitmap.rows];
    const auto add_rows = [&]<int rows>(int64_t row, int64_t apart, int64_t word, int64_t last, const T **values) {
        const bool whole = nnz - bitmap.crow_indices[row + (rows - 1) * apart + 1] >= ColumnVector<T>::columns;
        Multiplied<T> dy_of_rows[offpath::bitmap_dx_batch][rows];
        for (int64_t t = 0; t < args.batch; ++t)
            for (int r = 0; r < rows; ++r)
                dy_of_rows[t][r] = dy[t * args.dy_stride + row + r * apart];
        each_part_of_rows<T, rows>(
            bitmap, row, apart, word, last, values,
            [&] [[gnu::always_inline]] (int, int64_t column, const uint32_t (&bits)[rows], const T *const(&at)[rows]) {
                RowsOfColumns<T, rows, finite> weights;
                weights.expand(at, bits, whole);
                for (int64_t t = 0; t < args.batch; ++t)
#pragma GCC unroll 2
                    for (int i = 0; i < ColumnSums<T>::vectors; ++i) {
                        offpath::Sum<T> *sums = args.sums + t * args.sums_stride + column + i * S::lanes;
                        S::store(sums, weights.add(i, dy_of_rows[t], bits, S::load(sums)));
                    }
            });
    };
    each_strip<finite ? dx_rows_together : 1>(bitmap, block, args.batch * sizeof(offpath::Sum<T>), args.values,
                                              add_rows);
}

template <class T> void bitmap_dx(const offpath::bitmap_dx_args<T> &args, const offpath::Block &block) {
    args.dy_is_finite ? bitmap_dx_rows<T, true>(args, block) : bitmap_dx_rows<T, false>(args, block);
}

template <class T> void add_parts(const offpath::add_parts_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    for (int64_t t = block.row_begin; t < block.row_end; ++t)
        for (int64_t c = block.batch_begin; c < block.batch_end; c += S::lanes) {
            typename S::V sum = S::zero();
            for (int64_t part = 0; part < args.count; ++part)
                sum = S::add(sum, S::load(args.parts + (part * args.batch + t) * args.stride + c));
            const int64_t n = block.batch_end - c < S::lanes ? block.batch_end - c : S::lanes;
            S::store_first(args.y + t * args.columns + c, sum, n);
        }
}

// One token, or two where they are multiplied in pairs: an entry of dy with a register of neighbouring columns of x.
template <class T> struct TokenStep {
    using S = Simd<offpath::Sum<T>>;
    using V = typename S::V;
    static V load(const offpath::Sum<T> *p) { return S::load(p); }
    static V set1(offpath::Sum<T> entry) { return S::set1(entry); }
    static V multiply_add(V a, V b, V sum) { return S::fma(a, b, sum); }
};

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct TokenStep<bfloat16> {
    using V = BfloatPairs::V;
    static V load(const uint32_t *p) { return BfloatPairs::load(reinterpret_cast<const bfloat16 *>(p)); }
    static V set1(uint32_t pair) { return BfloatPairs::set1(pair); }
    static Simd<float>::V multiply_add(V a, V b, Simd<float>::V sum) { return BfloatPairs::dot(a, b, sum); }
};
#endif

template <class T> void bitmap_dvalues(const offpath::bitmap_dvalues_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    using Step = TokenStep<T>;
    constexpr int vectors = ColumnSums<T>::vectors;
    const offpath::Bitmap &bitmap = args.bitmap;
    const auto *dy = static_cast<const typename Format<T>::Value *>(args.dy);
    const auto *x = static_cast<const typename Format<T>::Value *>(args.x);
    const int64_t steps = (args.batch - 1) / Format<T>::columns_per_step + 1;
    const auto dot_rows = [&]<int rows>(int64_t row, int64_t apart, int64_t word, int64_t last, T **dvalues) {
        each_part_of_rows<T, rows>(
            bitmap, row, apart, word, last, dvalues,
            [&] [[gnu::always_inline]] (int, int64_t column, const uint32_t (&bits)[rows], T *const(&at)[rows]) {
                ColumnSums<T> sums[rows];
                for (int r = 0; r < rows; ++r)
                    for (auto &sum : sums[r].v)
                        sum = S::zero();
                for (int64_t step = 0; step < steps; ++step) {
                    typename Step::V of_columns[vectors];
                    for (int i = 0; i < vectors; ++i)
                        of_columns[i] = Step::load(x + step * args.x_stride + column + i * S::lanes);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; ++r) {
                        const typename Step::V of_row = Step::set1(dy[step * args.dy_stride + row + r * apart]);
#pragma GCC unroll 2
                        for (int i = 0; i < vectors; ++i)
                            sums[r].v[i] = Step::multiply_add(of_row, of_columns[i], sums[r].v[i]);
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < rows; ++r) { // what is too much in a whole register is written anew after it
                    const T *end = args.dvalues + bitmap.crow_indices[row + r * apart + 1];
                    sums[r].compress(bits[r], at[r], end - at[r] >= ColumnVector<T>::columns);
                }
            });
    };
    each_strip<dvalues_rows_together>(bitmap, block, steps * sizeof(offpath::Sum<T>), args.dvalues, dot_rows);
}

} // namespace
