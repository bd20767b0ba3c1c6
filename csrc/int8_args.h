// What int8 values are to the kernels, and the operands of those that multiply nothing else, over bits.
#pragma once

#include "basics.h"

namespace offpath {

// Values of int8 over a pattern: connection s of row r counts as scales[r] * values[s].
struct Int8Values {
    const int8_t *values; // [nnz]
    const float *scales;  // [rows]
};

// Those of T or, where these have scales, of int8.
template <class T> struct AnyValues {
    const T *values; // [nnz]
    Int8Values int8;
};

// The product of bitmap with int8 values: y[b, r] = bias[r] + scales[r] * sum of value * x[b, column].
template <class T> struct bitmap_int8_args {
    Bitmap bitmap;
    const int8_t *values; // [nnz]
    const float *scales;  // [rows]
    const T *bias;        // [rows], or null for zero
    const T *x;           // [batch, 64 * words_per_row], zero from `columns` on
    T *y;                 // [batch, rows], contiguous
    int64_t batch;
    bool x_is_finite; // else batch is 1
};

// Tokens as int8: x[b, c] is about sizes[b] * (level - 128), where sizes[b] is a 127th of the largest magnitude of
// token b, zero where that is smaller than smallest_token and NaN where it is not finite. Levels stand in blocks of
// dots_tokens tokens; in a block word by word, in a word token by token, and 128 behind the last column. The block's
// batch are tokens.
constexpr int dots_tokens = 16;
constexpr float largest_level = 127, smallest_token = 0x1p-119f;
template <class T> struct quantise_tokens_args {
    const T *x; // [batch, columns] with these strides
    int64_t x_feature_stride, x_batch_stride, columns, batch, words;
    uint8_t *levels; // [batch * 64 * words]
    float *sizes;    // [batch]
};

// y[b, r] = bias[r] + scales[r] * sizes[b] * sum of value * (level - 128), for a block of rows and one of tokens.
template <class T> struct int8_dots_args {
    Bitmap bitmap;
    const int8_t *values;  // [nnz]
    const float *scales;   // [rows]
    const T *bias;         // [rows], or null for zero
    const uint8_t *levels; // of words_per_row words
    const float *sizes;    // [batch]
    T *y;                  // [batch, rows], contiguous
};

// y[b, r] = bias[r] + scales[r] * sizes[b] * sums[b, r], for a block of rows and one of tokens.
template <class T> struct scale_sums_args {
    const int32_t *sums; // of the block; tokens lie sums_stride apart
    int64_t sums_stride;
    const float *scales, *sizes; // [rows], [batch]
    const T *bias;               // [rows], or null for zero
    T *y;                        // [batch, rows], contiguous
    int64_t rows;
};

} // namespace offpath
