// What AVX-512 and AVX2 have in common.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace {

// One after the other: _mm_set_ps has the compiler hold all addresses at once, for which there are no registers.
inline __m128 load_four_at(const float *p, const int32_t *at) {
    __m128 a = _mm_load_ss(p + at[0]);
    a = _mm_insert_ps(a, _mm_load_ss(p + at[1]), 0x10);
    a = _mm_insert_ps(a, _mm_load_ss(p + at[2]), 0x20);
    return _mm_insert_ps(a, _mm_load_ss(p + at[3]), 0x30);
}
inline __m256 load_eight_at(const float *p, const int32_t *at) {
    return _mm256_set_m128(load_four_at(p, at + 4), load_four_at(p, at));
}

} // namespace
