// Simd for AVX-512. Included by simd.h, which says what it offers.
#pragma once

#include "lanes.h"
#include "simd_x86.h"

namespace {

template <class T> struct Simd;

constexpr int vector_registers = 32;

template <> struct Simd<float> {
    using V = __m512;
    static constexpr int lanes = 16;
    static V zero() { return _mm512_setzero_ps(); }
    static V set1(float a) { return _mm512_set1_ps(a); }
    static V load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, V a) { _mm512_storeu_ps(p, a); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V load_at(const float *p, const int32_t *at) {
        return _mm512_insertf32x8(_mm512_castps256_ps512(load_eight_at(p, at)), load_eight_at(p, at + 8), 1);
    }
    static V load_first_at(const float *p, const int32_t *at, int64_t n) {
        const __m512i where = _mm512_maskz_loadu_epi32(mask(n), at);
        return _mm512_mask_i32gather_ps(zero(), mask(n), where, p, sizeof(float));
    }
    static V sum_four(const V (&a)[4]) {
        const auto pairs = [](V a, V b) {
            return _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        };
        const __m512d low = pairs(a[0], a[1]), high = pairs(a[2], a[3]);
        const V quarters =
            add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
        const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
        return _mm512_zextps128_ps512(_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V fma_lower_half(V a, V b, V c) {
        return _mm512_castps256_ps512(
            _mm256_fmadd_ps(_mm512_castps512_ps256(a), _mm512_castps512_ps256(b), _mm512_castps512_ps256(c)));
    }
    static V load_first(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store_first(float *p, V a, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), a); }
    static V larger(V a, V b) { return _mm512_max_ps(a, b); }
    static uint32_t above(V a, V threshold) { return _mm512_cmp_ps_mask(a, threshold, _CMP_NLE_UQ); }
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
    static V move_together(V spread, uint32_t bits) {
        return _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), spread);
    }
    static void compress(const float *spread, uint32_t bits, float *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static V keep_where(V a, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a); }
    static V load_first(const bfloat16 *p, int64_t n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p)), 16));
    }
    static void store_first(bfloat16 *p, V a, int64_t n) {
#if defined(__AVX512BF16__)
        // The instruction takes subnormal numbers for zeros, and keeps part of what a NaN carries.
        constexpr int nan_or_subnormal = 0x01 | 0x20 | 0x80;
        if (_mm512_fpclass_ps_mask(a, nan_or_subnormal) == 0) {
            _mm256_mask_storeu_epi16(p, mask(n), __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(a)));
            return;
        }
#endif
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __m512i narrowed = _mm512_mask_mov_epi32(
            _mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
        _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtepi32_epi16(narrowed));
    }
    static V expand(const bfloat16 *packed, uint32_t bits, bool whole) {
        return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits),
                                      load_first(packed, whole ? lanes : __builtin_popcount(bits)));
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed, bool) {
        const V side_by_side = move_together(load_first(spread, lanes), bits);
        _mm256_mask_storeu_epi16(packed, mask(__builtin_popcount(bits)),
                                 _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(side_by_side), 16)));
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
    static V load_at(const double *p, const int32_t *at) {
        return _mm512_set_pd(p[at[7]], p[at[6]], p[at[5]], p[at[4]], p[at[3]], p[at[2]], p[at[1]], p[at[0]]);
    }
    static V load_first_at(const double *p, const int32_t *at, int64_t n) {
        const __m256i where = _mm256_maskz_loadu_epi32(mask(n), at);
        return _mm512_mask_i32gather_pd(zero(), mask(n), where, p, sizeof(double));
    }
    static V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    static V fma_lower_half(V a, V b, V c) {
        return _mm512_castpd256_pd512(
            _mm256_fmadd_pd(_mm512_castpd512_pd256(a), _mm512_castpd512_pd256(b), _mm512_castpd512_pd256(c)));
    }
    static V load_first(const double *p, int64_t n) { return _mm512_maskz_loadu_pd(mask(n), p); }
    static void store_first(double *p, V a, int64_t n) { _mm512_mask_storeu_pd(p, mask(n), a); }
    static V larger(V a, V b) { return _mm512_max_pd(a, b); }
    static uint32_t above(V a, V threshold) { return _mm512_cmp_pd_mask(a, threshold, _CMP_NLE_UQ); }
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
    static V keep_where(V a, uint32_t bits) { return _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), a); }
    static V move_together(V spread, uint32_t bits) {
        return _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), spread);
    }
    static void compress(const double *spread, uint32_t bits, double *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static __mmask8 mask(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define OFFPATH_BFLOAT_PAIRS 1

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
    // What was summed of zipped pairs, in order again: the sums of the lower / upper 16 entries.
    static __m512 unzip_low(__m512 low, __m512 high) {
        return _mm512_permutex2var_ps(low, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                                      high);
    }
    static __m512 unzip_high(__m512 low, __m512 high) {
        return _mm512_permutex2var_ps(
            low, _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31), high);
    }
    // The other way round.
    static __m512 rezip_low(__m512 first, __m512 second) {
        return _mm512_permutex2var_ps(
            first, _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), second);
    }
    static __m512 rezip_high(__m512 first, __m512 second) {
        return _mm512_permutex2var_ps(
            first, _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31), second);
    }
    static __m512 dot(V a, V b, __m512 sum) {
        return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
    }
    static __m512 dot_lower_half(V a, V b, __m512 sum) {
        return _mm512_castps256_ps512(_mm256_dpbf16_ps(_mm512_castps512_ps256(sum),
                                                       __builtin_bit_cast(__m256bh, _mm512_castsi512_si256(a)),
                                                       __builtin_bit_cast(__m256bh, _mm512_castsi512_si256(b))));
    }
    static V expand(const bfloat16 *packed, uint32_t bits, bool whole) {
        return _mm512_maskz_expand_epi16(bits, whole ? load(packed) : load_first(packed, __builtin_popcount(bits)));
    }
    static void compress(V spread, uint32_t bits, bfloat16 *packed, bool whole) {
        const V side_by_side = _mm512_maskz_compress_epi16(bits, spread);
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed, bool whole) {
        compress(load(spread), bits, packed, whole);
    }
    // Pairs of a0 b0, a1 b1 ... of the lower / upper 16 entries: zips of ordered entries, with half as many shuffles.
    static V interleave_low(V a, V b) { return _mm512_permutex2var_epi16(a, places_of_pairs(), b); }
    static V interleave_high(V a, V b) {
        return _mm512_permutex2var_epi16(a, _mm512_add_epi32(places_of_pairs(), set1(0x00100010)), b);
    }
    static V places_of_pairs() {
        return _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                 0x280008, 0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F);
    }
    static uint32_t pair_at(const bfloat16 *p) {
        uint32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return pair;
    }
    // The lower / upper 16 entries.
    static __m512 widen_low(V a) { return widen(_mm512_extractf32x8_ps(as_floats(a), 0)); }
    static __m512 widen_high(V a) { return widen(_mm512_extractf32x8_ps(as_floats(a), 1)); }
    static __m512 widen(__m256 entries) {
        return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_castps_si256(entries)), 16));
    }
    // Both, rounded.
    static V narrow(__m512 low, __m512 high) {
        constexpr int nan_or_subnormal = 0x01 | 0x20 | 0x80; // see Simd<float>::store_first
        if ((_mm512_fpclass_ps_mask(low, nan_or_subnormal) | _mm512_fpclass_ps_mask(high, nan_or_subnormal)) == 0)
            return __builtin_bit_cast(V, _mm512_cvtne2ps_pbh(high, low));
        bfloat16 rounded[entries];
        Simd<float>::store_first(rounded, low, 16);
        Simd<float>::store_first(rounded + 16, high, 16);
        return load(rounded);
    }
    static __m512 as_floats(V a) { return _mm512_castsi512_ps(a); }
    static V as_pairs(__m512 a) { return _mm512_castps_si512(a); }
    // Entry 8q + i of the result is entry 4q + i, entry 8q + 4 + i is entry 16 + 4q + i (q, i < 4): zipped low and
    // high, two such registers give the first 16 and the last 16 entries in order.
    static V order_for_zip(V a) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), a); }
    // The first of the two entries at pair `i` in that order.
    static constexpr int64_t first_of_pair(int64_t i) { return 16 * (i / 2 % 2) + 4 * (i / 4) + 2 * (i % 2); }
    static __mmask32 mask(int64_t n) { return static_cast<__mmask32>((uint64_t{1} << n) - 1); }
};

#endif

} // namespace
