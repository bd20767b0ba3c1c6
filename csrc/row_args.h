// The operands of the kernels on sparse rows: a few entries of each sample, other ones in every step. Inside a row the
// indices may stand in any order and repeat.
#pragma once

#include "basics.h"

namespace offpath {

// A dense matrix whose rows are contiguous.
template <class T> struct Rows {
    T *data;
    int64_t stride;
};

// y[b] (+)= sum over the entries of row b of value * weight[index], for a block of rows x columns of the weight.
template <class T> struct rows_matmul_args {
    Csr entries;
    const T *values; // [nnz]
    Rows<const T> weight;
    Rows<T> y;
    bool add; // to what y holds; rows without an entry are then left alone
};

// dots[s] = <dy[b], weight[index]> for the entries s of row b; the block's rows.
template <class T> struct rows_dots_args {
    Csr entries;
    Rows<const T> dy, weight;
    int64_t width;
    T *dots; // [nnz]
};

// What was found of one row so far. `threshold` is a lower bound of what is wanted; NaN lets everything pass.
template <class T> struct Found {
    T *values;
    int32_t *indices;
    int64_t count;
    T threshold;
};

// Appends the entries of x that are larger than the threshold, or NaN, or those that are not zero, until `capacity` are
// found; `next` is where to go on, or `end` when done.
template <class T> struct find_above_args {
    const T *x;
    int64_t end, capacity;
    const T *thresholds; // one for each entry, or null for the one of `found`
    bool nonzeros;       // in place of any threshold
    int64_t *next;
    Found<T> *found;
};

// counts[b] = how many entries of row b are larger than their column's threshold, or NaN, or not zero where there are
// no thresholds; the block's rows.
template <class T> struct count_above_args {
    Rows<const T> x;
    int64_t columns;
    const T *thresholds; // [columns], or null
    int32_t *counts;
};

// *threshold = a number that k entries of x and hardly more are larger than; left as it is where minus infinity is
// among the k largest. It bounds the largest entries of `buckets` buckets (the entries i, i + buckets, i + 2 buckets
// ... of x), of which there are whole registers; these go to `maxima`, NaN not counted. Entries at the end that fill no
// register may not be counted either.
template <class T> struct bound_args {
    const T *x;
    int64_t entries, buckets, k;
    Sum<T> *maxima; // [buckets]
    T *threshold;
};

// Scores of a block of rows of the weight (whole groups, but for the last) for one panel of tokens: score = bias +
// <weight row, token>. What is larger than a token's threshold is appended to what was found of it; there must be room.
template <class T> struct encode_args {
    Rows<const T> weight;
    const T *bias; // or null
    const void *panel;
    int64_t width, tokens; // tokens of the panel
    Found<Sum<T>> *found;  // [tokens]
    Sum<T> *thresholds;    // [panel width], those of `found`; anything behind the last token
};

} // namespace offpath
