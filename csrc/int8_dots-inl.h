// The product of int8 values with int8 activations: tokens are rounded to a scale of their own, sums are taken in whole
// numbers, exactly. Where the CPU multiplies four bytes at once, a word of 64 columns is one instruction a token.
#pragma once

#include "int8-inl.h"
#include "layout-inl.h"
#include "simd_bytes.h"
#include "table.h"

namespace {

// Levels are stored 128 higher, since the instruction wants one operand without sign.
template <class T, bool contiguous> void quantise_token(const offpath::quantise_tokens_args<T> &args, int64_t token) {
    const int64_t stride = contiguous ? 1 : args.x_feature_stride;
    const T *x = args.x + token * args.x_batch_stride;
    // The bits of magnitudes are in the order of what they stand for, before those of infinity and NaN; and compilers
    // have vectors for the largest of whole numbers.
    constexpr uint32_t magnitude = 0x7FFFFFFF, infinity = 0x7F800000;
    uint32_t largest_bits = 0;
    for (int64_t c = 0; c < args.columns; ++c) {
        const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(compute(x[c * stride]))) & magnitude;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    const float largest = __builtin_bit_cast(float, largest_bits);
    // Below it, the factor would overflow.
    const bool lives = largest >= offpath::smallest_token;
    const float factor = lives ? offpath::largest_level / largest : 0;
    args.sizes[token] = largest_bits >= infinity ? __builtin_nanf("") : lives ? largest / offpath::largest_level : 0;
    const int64_t first = token / offpath::dots_tokens * offpath::dots_tokens;
    const int64_t tokens = args.batch - first < offpath::dots_tokens ? args.batch - first : offpath::dots_tokens;
    for (int64_t w = 0; w < args.words; ++w) {
        uint8_t *levels = args.levels + 64 * (first * args.words + w * tokens + token - first);
        const int64_t columns = args.columns - 64 * w < 64 ? args.columns - 64 * w : 64;
        const auto round = [&] [[gnu::always_inline]] (int64_t count) {
            for (int64_t c = 0; c < count; ++c) {
                // 1.5 * 2^23 leaves no bits for fractions: the sum is rounded to the nearest whole number, or the even
                // one of two.
                const float entry = static_cast<float>(compute(x[(64 * w + c) * stride]));
                levels[c] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, entry *factor + 0x1.8p23f) + 128);
            }
        };
        columns == 64 ? round(64) : round(columns);
        for (int64_t c = columns; c < 64; ++c)
            levels[c] = 128;
    }
}

// Block: batch counts tokens.
template <class T> void quantise_tokens(const offpath::quantise_tokens_args<T> &args, const offpath::Block &block) {
    for (int64_t token = block.batch_begin; token < block.batch_end; ++token)
        args.x_feature_stride == 1 ? quantise_token<T, true>(args, token) : quantise_token<T, false>(args, token);
}

// What one row and each token add up to, lane by lane.
template <int tokens>
[[gnu::always_inline]] inline void dots_row(const offpath::Bitmap &bitmap, int64_t row, const int8_t *values,
                                            const uint8_t *levels, ByteDots::V (&sums)[tokens]) {
    using B = ByteDots;
    B::V acc[tokens], offset = B::zero();
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t)
        acc[t] = B::zero();
    const uint64_t *words = bitmap.words + row * bitmap.words_per_row;
    for (int64_t w = 0; w < bitmap.words_per_row; ++w) {
        __builtin_prefetch(values + prefetched_bytes);
        const SpreadBytes spread = spread_bytes(values, words[w]);
        values += __builtin_popcountll(words[w]);
        offset = B::add_offset(offset, spread);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t)
            acc[t] = B::add(acc[t], levels + 64 * t, spread);
        levels += 64 * tokens;
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t)
        sums[t] = B::subtract(acc[t], offset);
}

// sums[t][i]: of row `first` + i and token t. Depends on no dtype, so that it is compiled once for all.
using WholeSums = int32_t[ByteDots::rows];
template <int tokens>
[[gnu::noinline]] void dots_rows(const offpath::Bitmap &bitmap, const int8_t *values, const uint8_t *levels,
                                 int64_t first, int64_t count, WholeSums (&sums)[offpath::dots_tokens]) {
    using B = ByteDots;
    B::V of_row[tokens][B::rows];
    for (int i = 0; i < B::rows; ++i) {
        B::V of_token[tokens];
        if (i < count)
            dots_row<tokens>(bitmap, first + i, values + bitmap.crow_indices[first + i], levels, of_token);
        for (int t = 0; t < tokens; ++t)
            of_row[t][i] = i < count ? of_token[t] : B::zero();
    }
    for (int t = 0; t < tokens; ++t)
        B::store(of_row[t], sums[t]);
}

// Block: rows are rows, batch is one block of tokens.
template <class T> void int8_dots(const offpath::int8_dots_args<T> &args, const offpath::Block &block) {
    constexpr int rows = ByteDots::rows;
    const uint8_t *levels = args.levels + block.batch_begin * 64 * args.bitmap.words_per_row;
    const int64_t tokens = block.batch_end - block.batch_begin;
    for (int64_t first = block.row_begin; first < block.row_end; first += rows) {
        const int64_t count = block.row_end - first < rows ? block.row_end - first : rows;
        WholeSums sums[offpath::dots_tokens];
        with_number<offpath::dots_tokens>(
            tokens, [&]<int known>() { dots_rows<known>(args.bitmap, args.values, levels, first, count, sums); });
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t token = block.batch_begin + t;
            scale_rows<T, rows>(sums[t], args.scales + first, args.sizes[token],
                                args.bias ? args.bias + first : nullptr, count,
                                args.y + token * args.bitmap.rows + first);
        }
    }
}

// Block: rows are rows, batch are tokens.
template <class T> void scale_sums(const offpath::scale_sums_args<T> &args, const offpath::Block &block) {
    constexpr int together = 32;
    for (int64_t token = block.batch_begin; token < block.batch_end; ++token) {
        const int32_t *sums = args.sums + (token - block.batch_begin) * args.sums_stride;
        const auto scale = [&] [[gnu::always_inline]] (int64_t row, int64_t count) {
            scale_rows<T, together>(sums + row - block.row_begin, args.scales + row, args.sizes[token],
                                    args.bias ? args.bias + row : nullptr, count, args.y + token * args.rows + row);
        };
        int64_t row = block.row_begin;
        for (; block.row_end - row >= together; row += together)
            scale(row, together); // a constant, for which compilers have vectors
        if (row < block.row_end)
            scale(row, block.row_end - row);
    }
}

} // namespace
