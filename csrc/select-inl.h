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

// The bits of the first n lanes that are not zero.
template <class T> [[gnu::always_inline]] inline uint32_t nonzero(const T *x, int64_t n) {
    using S = Simd<offpath::Sum<T>>;
    const typename S::V scores = ScoreVector<T>::load_first(x, n);
    const uint32_t bits = S::above(scores, S::zero()) | S::above(S::zero(), scores);
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
        uint32_t bits =
            args.nonzeros
                ? nonzero<T>(args.x + i, n)
                : above<T>(args.x + i, args.thresholds ? R::load_first(args.thresholds + i, n) : threshold, n);
        for (; bits; bits &= bits - 1) {
            const int64_t at = i + __builtin_ctz(bits);
            values[count] = args.x[at];
            indices[count] = static_cast<int32_t>(at);
            ++count;
        }
    }
    args.found->count = count;
    *args.next = i < args.end ? i : args.end;
}

template <class T> void find_maxima(const offpath::bound_args<T> &args) {
    using R = ScoreVector<T>;
    using S = typename R::S;
    // Half of the registers. The fewer go over the scores at once, the smaller the pieces in which memory is read.
    constexpr int together = vector_registers / 2;
    for (int64_t first = 0; first < args.buckets; first += together * S::lanes) {
        const int64_t left = (args.buckets - first) / S::lanes, vectors = left < together ? left : together;
        typename S::V largest[together];
        for (int v = 0; v < together; ++v)
            largest[v] = S::set1(-__builtin_inf());
        int64_t begin = first;
        if (vectors == together)
            for (; begin + together * S::lanes <= args.entries; begin += args.buckets)
#pragma GCC unroll 16
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

template <int bytes> struct IntegerOf;
template <> struct IntegerOf<2> {
    using Signed = int16_t;
    using Unsigned = uint16_t;
    static constexpr Unsigned smallest_normal = 0x0080, infinity = 0x7F80; // bfloat16
};
template <> struct IntegerOf<4> {
    using Signed = int32_t;
    using Unsigned = uint32_t;
    static constexpr Unsigned smallest_normal = 0x00800000, infinity = 0x7F800000;
};
template <> struct IntegerOf<8> {
    using Signed = int64_t;
    using Unsigned = uint64_t;
    static constexpr Unsigned smallest_normal = 0x0010000000000000, infinity = 0x7FF0000000000000;
};

// The number whose place in the order of all numbers is `key`. Where it is too small to be normal, the one below all of
// those: a processor that is told to flush them would not tell them from zero.
template <class T> [[gnu::always_inline]] inline T number_at(typename IntegerOf<sizeof(T)>::Signed key) {
    using I = IntegerOf<sizeof(T)>;
    using Bits = typename I::Unsigned;
    constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(T) - 1)), magnitude = static_cast<Bits>(sign - 1);
    const Bits bits = static_cast<Bits>(key < 0 ? static_cast<Bits>(key) ^ magnitude : key);
    const bool normal = (bits & magnitude) >= I::smallest_normal;
    return __builtin_bit_cast(T, normal ? bits : static_cast<Bits>(sign | I::smallest_normal));
}

// The block is not used. The threshold is found by bisection: counting what is larger takes a moment.
template <class T> void bound(const offpath::bound_args<T> &args, const offpath::Block &) {
    using S = Simd<offpath::Sum<T>>;
    using Key = typename IntegerOf<sizeof(T)>::Signed;
    using Bits = typename IntegerOf<sizeof(T)>::Unsigned;
    find_maxima(args);
    const int64_t enough = args.k + args.k / 8;
    // Infinity, and below minus infinity.
    Key high = IntegerOf<sizeof(T)>::infinity, low = static_cast<Key>(-high - 2);
    T threshold = *args.threshold;
    while (high - 1 > low) {
        const Bits distance = static_cast<Bits>(static_cast<Bits>(high) - static_cast<Bits>(low));
        const Key middle = static_cast<Key>(low + static_cast<Key>(distance / 2));
        const T tried = number_at<T>(middle);
        const typename S::V least = S::set1(compute(tried));
        int64_t count = 0;
        for (int64_t i = 0; i < args.buckets; i += S::lanes)
            count += __builtin_popcount(S::above(S::load(args.maxima + i), least));
        if (count < args.k) {
            high = middle;
            continue;
        }
        low = middle;
        threshold = tried;
        if (count <= enough)
            break;
    }
    *args.threshold = threshold;
}

// Block: rows.
template <class T> void count_above(const offpath::count_above_args<T> &args, const offpath::Block &block) {
    using R = ScoreVector<T>;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const T *x = args.x.data + row * args.x.stride;
        int32_t count = 0;
        for (int64_t i = 0; i < args.columns; i += R::entries) {
            const int64_t n = args.columns - i < R::entries ? args.columns - i : R::entries;
            count += __builtin_popcount(args.thresholds ? above<T>(x + i, R::load_first(args.thresholds + i, n), n)
                                                        : nonzero<T>(x + i, n));
        }
        args.counts[row] = count;
    }
}

} // namespace
