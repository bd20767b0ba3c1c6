// Which entries of dense scores are larger than a threshold.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// Scores in registers; bfloat16 is compared as the float that it is.
template <class T> struct ScoreVector {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int64_t entries = S::lanes;
    static typename S::V load_first(const T *p, int64_t n) {
        if constexpr (sizeof(T) == sizeof(offpath::Sum<T>))
            return n == entries ? S::load(p) : S::load_first(p, n);
        else
            return S::load_first(p, n);
    }
};

// The bits of the first n lanes that are larger than the threshold, or where one of both is NaN.
template <class T>
[[gnu::always_inline]] inline uint32_t above(const T *x, typename Simd<offpath::Sum<T>>::V threshold, int64_t n) {
    const uint32_t bits = Simd<offpath::Sum<T>>::above(ScoreVector<T>::load_first(x, n), threshold);
    return n == ScoreVector<T>::entries ? bits : bits & ((1u << n) - 1);
}

// The block is not used: a row is one thing.
template <class T> void find_above(const offpath::find_above_args<T> &args, const offpath::Block &) {
    using R = ScoreVector<T>;
    using S = typename R::S;
    // What is found is kept in locals: the compiler could not know that it is not among the scores.
    T *values = args.found->values;
    int32_t *indices = args.found->indices;
    int64_t count = args.found->count, i = *args.next;
    const typename S::V threshold = S::set1(compute(args.found->threshold));
    // A register's worth may be found at once.
    for (; i < args.end && count + R::entries <= args.capacity; i += R::entries) {
        const int64_t n = args.end - i < R::entries ? args.end - i : R::entries;
        for (uint32_t bits =
                 above<T>(args.x + i, args.thresholds ? R::load_first(args.thresholds + i, n) : threshold, n);
             bits; bits &= bits - 1) {
            const int64_t at = i + __builtin_ctz(bits);
            values[count] = args.x[at];
            indices[count] = static_cast<int32_t>(at);
            ++count;
        }
    }
    args.found->count = count;
    *args.next = i < args.end ? i : args.end;
}

// The block is not used.
template <class T> void maxima(const offpath::maxima_args<T> &args, const offpath::Block &) {
    using R = ScoreVector<T>;
    using S = typename R::S;
    constexpr int together = 8;
    for (int64_t first = 0; first < args.buckets; first += together * S::lanes) {
        const int64_t left = (args.buckets - first) / S::lanes, vectors = left < together ? left : together;
        typename S::V largest[together];
        for (int v = 0; v < together; ++v)
            largest[v] = S::set1(-__builtin_inf());
        int64_t begin = first;
        if (vectors == together)
            for (; begin + together * S::lanes <= args.entries; begin += args.buckets)
#pragma GCC unroll 8
                for (int v = 0; v < together; ++v)
                    largest[v] = S::larger(R::load_first(args.x + begin + v * S::lanes, S::lanes), largest[v]);
        // What is left is less than a round, or a narrower one. Less than a register may go uncounted.
        for (; begin < args.entries; begin += args.buckets)
            for (int v = 0; v < vectors; ++v)
                if (const int64_t at = begin + v * S::lanes; at + S::lanes <= args.entries)
                    largest[v] = S::larger(R::load_first(args.x + at, S::lanes), largest[v]);
        for (int v = 0; v < vectors; ++v)
            S::store(args.maxima + first + v * S::lanes, largest[v]);
    }
}

// Block: rows.
template <class T> void count_above(const offpath::count_above_args<T> &args, const offpath::Block &block) {
    using R = ScoreVector<T>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const T *x = args.x.data + row * args.x.stride;
        int32_t count = 0;
        for (int64_t i = 0; i < args.columns; i += R::entries) {
            const int64_t n = args.columns - i < R::entries ? args.columns - i : R::entries;
            count += __builtin_popcount(above<T>(x + i, R::load_first(args.thresholds + i, n), n));
        }
        args.counts[row] = count;
    }
}

} // namespace
