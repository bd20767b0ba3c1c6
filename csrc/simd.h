// The only file with intrinsics: a vector of T as wide as the ISA this translation unit is compiled for.
//
// Simd<T> offers: V (the register type), lanes, zero, set1, load, store, fma, load_first / store_first (the first
// n lanes, the rest reads as zero / is left alone), add, interleave_low / interleave_high (a0 b0 a1 b1 ... of the
// lower / upper halves), expand (values that stand side by side into the lanes whose bit is set, zero elsewhere; a
// whole register may be read where `whole`),
// compress (its inverse) and, for ISAs with masks, load_where (zero where the bit is not set). Simd<float> also loads
// and stores bfloat16. BfloatPairs, where the CPU has it: registers of bfloat16 whose neighbours are multiplied and
// added in pairs. Everything is in an anonymous namespace so that no variant exports code to another one.
#pragma once

#include "lanes.h"
#include "table.h"

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
    static V expand(const float *packed, uint32_t bits, bool whole) {
        return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits),
                                      whole ? load(packed) : load_first(packed, __builtin_popcount(bits)));
    }
    static void compress(const float *spread, uint32_t bits, float *packed) {
        store_first(packed, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), load(spread)),
                    __builtin_popcount(bits));
    }
    static V load_where(const float *p, uint32_t bits) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
    }
    static V load_first(const bfloat16 *p, int64_t n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p)), 16));
    }
    static void store_first(bfloat16 *p, V a, int64_t n) {
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __m512i narrowed = _mm512_mask_mov_epi32(
            _mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
        _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtepi32_epi16(narrowed));
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
    static V expand(const double *packed, uint32_t bits, bool whole) {
        return _mm512_maskz_expand_pd(static_cast<__mmask8>(bits),
                                      whole ? load(packed) : load_first(packed, __builtin_popcount(bits)));
    }
    static V load_where(const double *p, uint32_t bits) {
        return _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p);
    }
    static void compress(const double *spread, uint32_t bits, double *packed) {
        store_first(packed, _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), load(spread)),
                    __builtin_popcount(bits));
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
    static V expand(const float *packed, uint32_t bits, bool) {
        float spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load(spread);
    }
    static V load_where(const float *p, uint32_t bits) {
        float selected[lanes];
        load_lanes_where(p, bits, lanes, selected);
        return load(selected);
    }
    static void compress(const float *spread, uint32_t bits, float *packed) {
        compress_lanes(spread, bits, lanes, packed);
    }
    static V load_first(const bfloat16 *p, int64_t n) {
        if (n < lanes) {
            bfloat16 a[lanes] = {};
            for (int64_t i = 0; i < n; ++i)
                a[i] = p[i];
            return load_first(a, lanes);
        }
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void store_first(bfloat16 *p, V v, int64_t n) {
        float a[lanes];
        store(a, v);
        for (int64_t i = 0; i < n; ++i)
            p[i] = narrow(a[i]);
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
    static V expand(const double *packed, uint32_t bits, bool) {
        double spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load(spread);
    }
    static V load_where(const double *p, uint32_t bits) {
        double selected[lanes];
        load_lanes_where(p, bits, lanes, selected);
        return load(selected);
    }
    static void compress(const double *spread, uint32_t bits, double *packed) {
        compress_lanes(spread, bits, lanes, packed);
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
    static V expand(const T *packed, uint32_t bits, bool) {
        T spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load(spread);
    }
    static V load_where(const T *p, uint32_t bits) {
        T selected[lanes];
        load_lanes_where(p, bits, lanes, selected);
        return load(selected);
    }
    static void compress(const T *spread, uint32_t bits, T *packed) { compress_lanes(spread, bits, lanes, packed); }
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

#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

// 32 bfloat16, or 16 pairs of them: dot multiplies pair by pair and adds both products to a float lane. Subnormal
// operands count as zero there.
struct BfloatPairs {
    using V = __m512i;
    static constexpr int entries = 32;
    static V zero() { return _mm512_setzero_si512(); }
    static V load(const bfloat16 *p) { return _mm512_loadu_si512(p); }
    static V load_first(const bfloat16 *p, int64_t n) { return _mm512_maskz_loadu_epi16(mask(n), p); }
    static void store(bfloat16 *p, V a) { _mm512_storeu_si512(p, a); }
    static void store_first(bfloat16 *p, V a, int64_t n) { _mm512_mask_storeu_epi16(p, mask(n), a); }
    static V load_where(const bfloat16 *p, uint32_t bits) { return _mm512_maskz_loadu_epi16(bits, p); }
    static V set1(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }
    // Pairs of a0 b0, a1 b1 ... of the lower / upper 4 entries of each 16-byte quarter.
    static V zip_low(V a, V b) { return _mm512_unpacklo_epi16(a, b); }
    static V zip_high(V a, V b) { return _mm512_unpackhi_epi16(a, b); }
    static __m512 dot(V a, V b, __m512 sum) {
        return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
    }
    static V expand(const bfloat16 *packed, uint32_t bits, bool whole) {
        return _mm512_maskz_expand_epi16(bits, whole ? load(packed) : load_first(packed, __builtin_popcount(bits)));
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed) {
        store_first(packed, _mm512_maskz_compress_epi16(bits, load(spread)), __builtin_popcount(bits));
    }
    static __m512 as_floats(V a) { return _mm512_castsi512_ps(a); }
    static V as_pairs(__m512 a) { return _mm512_castps_si512(a); }
    // Entry 8q + i of the result is entry 4q + i, entry 8q + 4 + i is entry 16 + 4q + i (q, i < 4): zipped low and
    // high, two such registers give the first 16 and the last 16 entries in order.
    static V order_for_zip(V a) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), a); }
    static __mmask32 mask(int64_t n) { return static_cast<__mmask32>((uint64_t{1} << n) - 1); }
};

#endif

} // namespace
