// Simd for the baseline of every processor. Included by simd.h, which says what it offers.
#pragma once

#include "lanes.h"

namespace {

template <class T> struct Simd;

constexpr int vector_registers = 16;

// 16-byte vectors by the compiler's vector extension: SSE2 on x86-64. The x86-64 baseline has no fused multiply-add, so
// here the product is rounded before it is added.
template <class T> struct Simd {
    typedef T V __attribute__((vector_size(16)));
    static constexpr int lanes = 16 / sizeof(T);
    static V zero() { return V{}; }
    static V set1(T a) { return V{} + a; }
    static V load(const T *p) {
        V a;
        __builtin_memcpy(&a, p, sizeof a);
        return a;
    }
    static void store(T *p, V a) { __builtin_memcpy(p, &a, sizeof a); }
    static V add(V a, V b) { return a + b; }
    static V load_at(const T *p, const int32_t *at) { return load_first_at(p, at, lanes); }
    static V load_first_at(const T *p, const int32_t *at, int64_t n) { return load_lanes_at<V>(p, at, n); }
    static V fma(V a, V b, V c) { return a * b + c; }
    static V larger(V a, V b) { return a > b ? a : b; }
    static uint32_t above(V a, V threshold) {
        uint32_t bits = 0;
        for (int i = 0; i < lanes; ++i)
            bits |= static_cast<uint32_t>(!(a[i] <= threshold[i])) << i;
        return bits;
    }
    static V load_first(const T *p, int64_t n) {
        T a[lanes] = {};
        for (int64_t i = 0; i < n; ++i)
            a[i] = p[i];
        return load(a);
    }
    static void store_first(T *p, V a, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            p[i] = a[i];
    }
    template <class U> static V expand(const U *packed, uint32_t bits, bool) {
        U spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load_first(spread, lanes);
    }
    static V keep_where(V a, uint32_t bits) {
        using Mask = decltype(V{} == V{});
        Mask each = {1, 2};
        if constexpr (lanes == 4)
            each = Mask{1, 2, 4, 8};
        return ((Mask{} + bits) & each) == each ? a : zero();
    }
    static V move_together(V spread, uint32_t bits) {
        T a[lanes], together[lanes] = {};
        store(a, spread);
        compress_lanes(a, bits, lanes, together);
        return load(together);
    }
    template <class U> static void compress(const U *spread, uint32_t bits, U *packed, bool) {
        compress_lanes(spread, bits, lanes, packed);
    }
    static V load_first(const bfloat16 *p, int64_t n) {
        T a[lanes] = {};
        for (int64_t i = 0; i < n; ++i)
            a[i] = widen(p[i]);
        return load(a);
    }
    static void store_first(bfloat16 *p, V v, int64_t n) {
        T a[lanes];
        store(a, v);
        for (int64_t i = 0; i < n; ++i)
            p[i] = narrow(a[i]);
    }
    static V interleave_low(V a, V b) { return interleave(a, b, 0); }
    static V interleave_high(V a, V b) { return interleave(a, b, lanes / 2); }
    static V interleave(V a, V b, int from) {
        V mixed;
        for (int i = 0; i < lanes; ++i)
            mixed[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
        return mixed;
    }
};

} // namespace
