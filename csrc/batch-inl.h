// Dot products along the batch.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// One register of neighbours of the batch, multiplied and added lane by lane.
template <class T> struct BatchVector {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int64_t tokens = S::lanes;
    using V = typename S::V;
    static V load(const offpath::Sum<T> *p) { return S::load(p); }
    static V ones() { return S::set1(1); }
    static typename S::V multiply(V a, V b) { return a * b; }
    static typename S::V multiply_add(V a, V b, typename S::V sum) { return S::fma(a, b, sum); }
};

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct BatchVector<bfloat16> {
    using V = BfloatPairs::V;
    static constexpr int64_t tokens = BfloatPairs::entries;
    static V load(const bfloat16 *p) { return BfloatPairs::load(p); }
    static V ones() { return BfloatPairs::set1(0x3F803F80); }
    static Simd<float>::V multiply(V a, V b) { return BfloatPairs::dot(a, b, Simd<float>::zero()); }
    static Simd<float>::V multiply_add(V a, V b, Simd<float>::V sum) { return BfloatPairs::dot(a, b, sum); }
};
#endif

} // namespace
