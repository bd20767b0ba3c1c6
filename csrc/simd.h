// The only file with intrinsics: a vector of T as wide as the ISA this translation unit is compiled for.
//
// Simd<T> offers: V (the register type), lanes, zero, set1, load, store, fma, load_first / store_first (the first
// n lanes, the rest reads as zero / is left alone), add, and interleave_low / interleave_high (a0 b0 a1 b1 ... of the
// lower / upper halves).
// Everything is in an anonymous namespace so that no variant exports code to another one.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

template <class T> struct Simd;

#if defined(__AVX512F__)

template <> struct Simd<float> {
    using V = __m512;
    static constexpr int lanes = 16;
    static V zero() { return _mm512_setzero_ps(); }
    static V set1(float a) { return _mm512_set1_ps(a); }
    static V load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, V a) { _mm512_storeu_ps(p, a); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V load_first(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store_first(float *p, V a, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), a); }
    static V interleave_low(V a, V b) {
        return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
    }
    static V interleave_high(V a, V b) {
        return _mm512_permutex2var_ps(
            a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
    }
    static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};

template <> struct Simd<double> {
    using V = __m512d;
    static constexpr int lanes = 8;
    static V zero() { return _mm512_setzero_pd(); }
    static V set1(double a) { return _mm512_set1_pd(a); }
    static V load(const double *p) { return _mm512_loadu_pd(p); }
    static void store(double *p, V a) { _mm512_storeu_pd(p, a); }
    static V add(V a, V b) { return _mm512_add_pd(a, b); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    static V load_first(const double *p, int64_t n) { return _mm512_maskz_loadu_pd(mask(n), p); }
    static void store_first(double *p, V a, int64_t n) { _mm512_mask_storeu_pd(p, mask(n), a); }
    static V interleave_low(V a, V b) {
        return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
    }
    static V interleave_high(V a, V b) {
        return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
    }
    static __mmask8 mask(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
};

#elif defined(__AVX2__) && defined(__FMA__)

template <> struct Simd<float> {
    using V = __m256;
    static constexpr int lanes = 8;
    static V zero() { return _mm256_setzero_ps(); }
    static V set1(float a) { return _mm256_set1_ps(a); }
    static V load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, V a) { _mm256_storeu_ps(p, a); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V load_first(const float *p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
    static void store_first(float *p, V a, int64_t n) { _mm256_maskstore_ps(p, mask(n), a); }
    // The unpack instructions work inside 128-bit halves; the permutation puts the halves where they belong.
    static V interleave_low(V a, V b) {
        return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
    }
    static V interleave_high(V a, V b) {
        return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
    }
    static __m256i mask(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
};

template <> struct Simd<double> {
    using V = __m256d;
    static constexpr int lanes = 4;
    static V zero() { return _mm256_setzero_pd(); }
    static V set1(double a) { return _mm256_set1_pd(a); }
    static V load(const double *p) { return _mm256_loadu_pd(p); }
    static void store(double *p, V a) { _mm256_storeu_pd(p, a); }
    static V add(V a, V b) { return _mm256_add_pd(a, b); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    static V load_first(const double *p, int64_t n) { return _mm256_maskload_pd(p, mask(n)); }
    static void store_first(double *p, V a, int64_t n) { _mm256_maskstore_pd(p, mask(n), a); }
    static V interleave_low(V a, V b) {
        return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
    }
    static V interleave_high(V a, V b) {
        return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
    }
    static __m256i mask(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};

#else

// 16-byte vectors by the compiler's vector extension: SSE2 on x86-64, NEON on AArch64. The x86-64 baseline has no
// fused multiply-add, so here the product is rounded before it is added.
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
    static V fma(V a, V b, V c) { return a * b + c; }
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
    static V interleave_low(V a, V b) { return interleave(a, b, 0); }
    static V interleave_high(V a, V b) { return interleave(a, b, lanes / 2); }
    static V interleave(V a, V b, int from) {
        V mixed;
        for (int i = 0; i < lanes; ++i)
            mixed[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
        return mixed;
    }
};

#endif

// Lane i of the result is the sum over the lanes of a[i], by a tree that is the same for every i. Destroys a.
template <class T> typename Simd<T>::V sum_each(typename Simd<T>::V (&a)[Simd<T>::lanes]) {
    using S = Simd<T>;
    for (int half = S::lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            a[i] = S::add(S::interleave_low(a[i], a[i + half]), S::interleave_high(a[i], a[i + half]));
    return a[0];
}

} // namespace
