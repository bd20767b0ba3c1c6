// Scalar pieces that every ISA shares: bfloat16 to and from float, and what an ISA does lane by lane where it has no
// instruction.
#pragma once

#include "table.h"

#include <cstdint>

namespace {

using offpath::bfloat16;

inline float widen(bfloat16 a) { return __builtin_bit_cast(float, static_cast<uint32_t>(a.bits) << 16); }

// To the nearest, ties to even, as torch rounds; every NaN becomes the quiet one.
inline bfloat16 narrow(float a) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, a);
    if (a != a)
        return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float compute(float a) { return a; }
inline double compute(double a) { return a; }
inline float compute(bfloat16 a) { return widen(a); }
inline float compute(int8_t a) { return a; }
inline bfloat16 as_bfloat16(bfloat16 a) { return a; }
inline bfloat16 as_bfloat16(int8_t a) { // every int8 is one: nothing is rounded
    return {static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(a)) >> 16)};
}

// What an ISA without the instruction does lane by lane.
template <class V, class T> V load_lanes_at(const T *p, const int32_t *at, int64_t n) {
    V a = {};
    for (int64_t i = 0; i < n; ++i)
        a[i] = p[at[i]];
    return a;
}
template <class T> void expand_lanes(const T *packed, uint32_t bits, int lanes, T *spread) {
    for (int i = 0; i < lanes; ++i)
        spread[i] = bits >> i & 1 ? *packed++ : T{};
}
template <class T> void compress_lanes(const T *spread, uint32_t bits, int lanes, T *packed) {
    for (int i = 0; i < lanes; ++i)
        if (bits >> i & 1)
            *packed++ = spread[i];
}

} // namespace
