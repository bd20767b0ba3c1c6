// Sums over the lanes of several registers at once.
#pragma once

#include "simd.h"

namespace {

// Lane i of the result is the sum over the lanes of a[i], by a tree that is the same for every i. Destroys a.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::V sum_each(typename Simd<T>::V (&a)[Simd<T>::lanes]) {
    using S = Simd<T>;
#pragma GCC unroll 4
    for (int half = S::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            a[i] = S::add(S::interleave_low(a[i], a[i + half]), S::interleave_high(a[i], a[i + half]));
    return a[0];
}

// How many registers sum_some takes: what one quarter of the widest register holds, if there are so many lanes.
template <class T> constexpr int summed_together = Simd<T>::lanes < 4 ? Simd<T>::lanes : 4;

// The first lanes of the result are the sums over the lanes of a[0], a[1] ..., by a tree that is the same for all.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::V sum_some(const typename Simd<T>::V (&a)[summed_together<T>]) {
    typename Simd<T>::V all[Simd<T>::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Simd<T>::lanes; ++i)
        all[i] = i < summed_together<T> ? a[i] : Simd<T>::zero();
    return sum_each<T>(all);
}

#if defined(__AVX2__) && defined(__FMA__)
// Each 16-byte part of the result holds the sums of a[0] to a[3] over its own lanes.
inline __m128 sum_parts(__m256 parts) {
    return _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1));
}
#endif

#if defined(__AVX512F__)
template <> [[gnu::always_inline]] inline __m512 sum_some<float>(const __m512 (&a)[4]) {
    const auto pairs = [](__m512 a, __m512 b) {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    };
    const __m512d low = pairs(a[0], a[1]), high = pairs(a[2], a[3]);
    const __m512 parts =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(parts), _mm512_extractf32x8_ps(parts, 1));
    return _mm512_zextps128_ps512(sum_parts(halves));
}
#elif defined(__AVX2__) && defined(__FMA__)
template <> [[gnu::always_inline]] inline __m256 sum_some<float>(const __m256 (&a)[4]) {
    const auto pairs = [](__m256 a, __m256 b) {
        return _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    };
    const __m256d low = pairs(a[0], a[1]), high = pairs(a[2], a[3]);
    return _mm256_zextps128_ps256(sum_parts(_mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                                                          _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)))));
}
#endif

} // namespace
