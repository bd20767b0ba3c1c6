// Simd for AVX2 and FMA. Included by simd.h, which says what it offers.
#pragma once

#include "lanes.h"
#include "simd_x86.h"

namespace {

template <class T> struct Simd;

constexpr int vector_registers = 16;

// For each set of eight lanes: which of the values that stand side by side belongs into each lane (negative: none), and
// which lane's value comes at each place.
struct LaneOrders {
    int8_t expand[256][8], compress[256][8];
    uint8_t of_doubles[16]; // a set of four lanes, twice as wide, as one of eight
    constexpr LaneOrders() : expand{}, compress{}, of_doubles{} {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, next = 0; lane < 8; next += bits >> lane & 1, ++lane) {
                expand[bits][lane] = bits >> lane & 1 ? static_cast<int8_t>(next) : int8_t{-1};
                if (bits >> lane & 1)
                    compress[bits][next] = static_cast<int8_t>(lane);
            }
        for (int bits = 0; bits < 16; ++bits)
            for (int lane = 0; lane < 4; ++lane)
                of_doubles[bits] |= static_cast<uint8_t>((bits >> lane & 1) * 3 << 2 * lane);
    }
};
constexpr LaneOrders lane_orders{};

template <> struct Simd<float> {
    using V = __m256;
    static constexpr int lanes = 8;
    static V zero() { return _mm256_setzero_ps(); }
    static V set1(float a) { return _mm256_set1_ps(a); }
    static V load(const float *p) { return _mm256_loadu_ps(p); }
    static V load(const bfloat16 *p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void store(float *p, V a) { _mm256_storeu_ps(p, a); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V load_at(const float *p, const int32_t *at) { return load_eight_at(p, at); }
    static V load_first_at(const float *p, const int32_t *at, int64_t n) {
        const __m256i where = _mm256_maskload_epi32(at, mask(n));
        return _mm256_mask_i32gather_ps(zero(), p, where, _mm256_castsi256_ps(mask(n)), sizeof(float));
    }
    static V sum_four(const V (&a)[4]) {
        const auto pairs = [](V a, V b) {
            return _mm256_castps_pd(add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
        };
        const __m256d low = pairs(a[0], a[1]), high = pairs(a[2], a[3]);
        const V halves =
            add(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
        return _mm256_zextps128_ps256(_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V load_first(const float *p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
    // In pieces: AMD's processors take a dozen cycles for a store with a mask.
    static void store_first(float *p, V a, int64_t n) {
        if (n >= lanes)
            return store(p, a);
        __m128 rest = _mm256_castps256_ps128(a);
        if (n & 4) {
            _mm_storeu_ps(p, rest);
            rest = _mm256_extractf128_ps(a, 1);
            p += 4;
        }
        if (n & 2) {
            _mm_storel_pi(reinterpret_cast<__m64 *>(p), rest);
            rest = _mm_movehl_ps(rest, rest);
            p += 2;
        }
        if (n & 1)
            _mm_store_ss(p, rest);
    }
    static V larger(V a, V b) { return _mm256_max_ps(a, b); }
    static uint32_t above(V a, V threshold) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, threshold, _CMP_NLE_UQ)));
    }
    // The unpack instructions work inside 128-bit halves; the permutation puts the halves where they belong.
    static V interleave_low(V a, V b) {
        return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
    }
    static V interleave_high(V a, V b) {
        return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
    }
    template <class T> static V expand(const T *packed, uint32_t bits, bool whole) {
        if (whole)
            return move_apart(load(packed), bits);
        T spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load(spread);
    }
    static V move_apart(V side_by_side, uint32_t bits) {
        const __m256i order = wide(lane_orders.expand[bits]);
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(side_by_side, order), zero(), _mm256_castsi256_ps(order));
    }
    static V keep_where(V a, uint32_t bits) {
        const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each);
        return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(mine, each)));
    }
    static void compress(const float *spread, uint32_t bits, float *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        if (whole)
            store(packed, side_by_side);
        else // of any number: branches on it would be mispredicted
            _mm256_maskstore_ps(packed, mask(__builtin_popcount(bits)), side_by_side);
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        const __m128i narrowed = halves(_mm256_srli_epi32(_mm256_castps_si256(side_by_side), 16));
        const int n = __builtin_popcount(bits);
        if (whole) {
            _mm_storeu_si128(reinterpret_cast<__m128i *>(packed), narrowed);
        } else if (n > 0) { // pairs, which a mask can select, and the last one
            bfloat16 all[lanes];
            _mm_storeu_si128(reinterpret_cast<__m128i *>(all), narrowed);
            _mm_maskstore_epi32(reinterpret_cast<int *>(packed), _mm256_castsi256_si128(mask(n / 2)), narrowed);
            packed[n - 1] = all[n - 1];
        }
    }
    static V move_together(V spread, uint32_t bits) {
        return _mm256_permutevar8x32_ps(spread, wide(lane_orders.compress[bits]));
    }
    static __m256i wide(const int8_t (&order)[lanes]) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(order)));
    }
    static V load_first(const bfloat16 *p, int64_t n) {
        if (n < lanes) {
            bfloat16 a[lanes] = {};
            for (int64_t i = 0; i < n; ++i)
                a[i] = p[i];
            return load(a);
        }
        return load(p);
    }
    static void store_first(bfloat16 *p, V a, int64_t n) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        __m128i rest = halves(_mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), is_nan));
        if (n >= lanes)
            return _mm_storeu_si128(reinterpret_cast<__m128i *>(p), rest);
        if (n & 4) {
            _mm_storel_epi64(reinterpret_cast<__m128i *>(p), rest);
            rest = _mm_srli_si128(rest, 8);
            p += 4;
        }
        if (n & 2) {
            const int two = _mm_cvtsi128_si32(rest);
            __builtin_memcpy(p, &two, sizeof two);
            rest = _mm_srli_si128(rest, 4);
            p += 2;
        }
        if (n & 1)
            p->bits = static_cast<uint16_t>(_mm_extract_epi16(rest, 0));
    }
    // The lower halves of eight numbers that have no upper ones.
    static __m128i halves(__m256i a) {
        return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
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
    static V load_at(const double *p, const int32_t *at) {
        return _mm256_set_pd(p[at[3]], p[at[2]], p[at[1]], p[at[0]]);
    }
    static V load_first_at(const double *p, const int32_t *at, int64_t n) { return load_lanes_at<V>(p, at, n); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    static V load_first(const double *p, int64_t n) { return _mm256_maskload_pd(p, mask(n)); }
    static void store_first(double *p, V a, int64_t n) {
        if (n >= lanes)
            store(p, a);
        else
            _mm256_maskstore_pd(p, mask(n), a);
    }
    static V larger(V a, V b) { return _mm256_max_pd(a, b); }
    static uint32_t above(V a, V threshold) {
        return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a, threshold, _CMP_NLE_UQ)));
    }
    static V interleave_low(V a, V b) {
        return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
    }
    static V interleave_high(V a, V b) {
        return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
    }
    static V expand(const double *packed, uint32_t bits, bool whole) {
        if (whole)
            return _mm256_castps_pd(
                Simd<float>::move_apart(_mm256_castpd_ps(load(packed)), lane_orders.of_doubles[bits]));
        double spread[lanes];
        expand_lanes(packed, bits, lanes, spread);
        return load(spread);
    }
    static V keep_where(V a, uint32_t bits) {
        const __m256i each = _mm256_setr_epi64x(1, 2, 4, 8);
        const __m256i mine = _mm256_and_si256(_mm256_set1_epi64x(bits), each);
        return _mm256_and_pd(a, _mm256_castsi256_pd(_mm256_cmpeq_epi64(mine, each)));
    }
    static void compress(const double *spread, uint32_t bits, double *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        if (whole)
            store(packed, side_by_side);
        else
            _mm256_maskstore_pd(packed, mask(__builtin_popcount(bits)), side_by_side);
    }
    static V move_together(V spread, uint32_t bits) {
        return _mm256_castps_pd(Simd<float>::move_together(_mm256_castpd_ps(spread), lane_orders.of_doubles[bits]));
    }
    static __m256i mask(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};

} // namespace
