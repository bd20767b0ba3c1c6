// Simd for AArch64, whose every processor has NEON. Included by simd.h, which says what it offers.
#pragma once

#include "lanes.h"

#include <arm_neon.h>

namespace {

template <class T> struct Simd;

constexpr int vector_registers = 32;

// For each set of lanes of `lane_bytes` bytes: which byte of the values that stand side by side belongs at each place
// of a register, and the other way round. What the table instruction does not find in a register, it reads as zero.
template <int lane_bytes> struct ByteOrders {
    static constexpr int lanes = 16 / lane_bytes;
    uint8_t expand[1 << lanes][16], compress[1 << lanes][16];
    constexpr ByteOrders() : expand{}, compress{} {
        for (int bits = 0; bits < 1 << lanes; ++bits) {
            for (int at = 0; at < 16; ++at)
                expand[bits][at] = compress[bits][at] = nowhere;
            for (int lane = 0, next = 0; lane < lanes; ++lane)
                if (bits >> lane & 1) {
                    for (int byte = 0; byte < lane_bytes; ++byte) {
                        expand[bits][lane * lane_bytes + byte] = static_cast<uint8_t>(next * lane_bytes + byte);
                        compress[bits][next * lane_bytes + byte] = static_cast<uint8_t>(lane * lane_bytes + byte);
                    }
                    ++next;
                }
        }
    }
    static constexpr uint8_t nowhere = 255;
};
template <int lane_bytes> constexpr ByteOrders<lane_bytes> byte_orders{};

inline uint8x16_t move_bytes(uint8x16_t a, const uint8_t (&order)[16]) { return vqtbl1q_u8(a, vld1q_u8(order)); }

template <> struct Simd<float> {
    using V = float32x4_t;
    static constexpr int lanes = 4;
    static V zero() { return vdupq_n_f32(0); }
    static V set1(float a) { return vdupq_n_f32(a); }
    static V load(const float *p) { return vld1q_f32(p); }
    static V load(const bfloat16 *p) { return widen_halves(vld1_u16(&p->bits)); }
    static void store(float *p, V a) { vst1q_f32(p, a); }
    static V add(V a, V b) { return vaddq_f32(a, b); }
    static V load_at(const float *p, const int32_t *at) {
        V a = vld1q_dup_f32(p + at[0]);
        a = vld1q_lane_f32(p + at[1], a, 1);
        a = vld1q_lane_f32(p + at[2], a, 2);
        return vld1q_lane_f32(p + at[3], a, 3);
    }
    static V load_first_at(const float *p, const int32_t *at, int64_t n) { return load_lanes_at<V>(p, at, n); }
    static V sum_four(const V (&a)[4]) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }
    static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
    template <class T> static V load_first(const T *p, int64_t n) {
        if (n >= lanes)
            return load(p);
        T a[lanes] = {};
        for (int64_t i = 0; i < n; ++i)
            a[i] = p[i];
        return load(a);
    }
    static void store_first(float *p, V a, int64_t n) {
        if (n >= lanes)
            return store(p, a);
        float32x2_t rest = vget_low_f32(a);
        if (n & 2) {
            vst1_f32(p, rest);
            rest = vget_high_f32(a);
            p += 2;
        }
        if (n & 1)
            vst1_lane_f32(p, rest, 0);
    }
    static V larger(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static uint32_t above(V a, V threshold) {
        return vaddvq_u32(vbicq_u32(vld1q_u32(bit_of_lane), vcleq_f32(a, threshold)));
    }
    static V interleave_low(V a, V b) { return vzip1q_f32(a, b); }
    static V interleave_high(V a, V b) { return vzip2q_f32(a, b); }
    template <class T> static V expand(const T *packed, uint32_t bits, bool whole) {
        return move_apart(whole ? load(packed) : load_first(packed, __builtin_popcount(bits)), bits);
    }
    static V move_apart(V side_by_side, uint32_t bits) {
        return vreinterpretq_f32_u8(move_bytes(vreinterpretq_u8_f32(side_by_side), byte_orders<4>.expand[bits]));
    }
    static V move_together(V spread, uint32_t bits) {
        return vreinterpretq_f32_u8(move_bytes(vreinterpretq_u8_f32(spread), byte_orders<4>.compress[bits]));
    }
    static V keep_where(V a, uint32_t bits) {
        const uint32x4_t where = vtstq_u32(vdupq_n_u32(bits), vld1q_u32(bit_of_lane));
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), where));
    }
    static void compress(const float *spread, uint32_t bits, float *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed, bool whole) {
        const uint16x4_t halves =
            vshrn_n_u32(vreinterpretq_u32_f32(move_together(load(spread), bits)), 16); // they were bfloat16
        store_halves(packed, halves, whole ? lanes : __builtin_popcount(bits));
    }
    // BFCVT would keep part of what a NaN carries.
    static void store_first(bfloat16 *p, V a, int64_t n) { store_halves(p, narrow_halves(a), n); }
    static V widen_halves(uint16x4_t halves) { return vreinterpretq_f32_u32(vshll_n_u16(halves, 16)); }
    static uint16x4_t narrow_halves(V a) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7FC00000)), 16);
    }
    static void store_halves(bfloat16 *p, uint16x4_t halves, int64_t n) {
        if (n >= lanes)
            return vst1_u16(&p->bits, halves);
        if (n & 2) {
            const uint32_t two = vget_lane_u32(vreinterpret_u32_u16(halves), 0);
            __builtin_memcpy(p, &two, sizeof two);
            halves = vreinterpret_u16_u32(vrev64_u32(vreinterpret_u32_u16(halves)));
            p += 2;
        }
        if (n & 1)
            vst1_lane_u16(&p->bits, halves, 0);
    }
    static constexpr uint32_t bit_of_lane[lanes] = {1, 2, 4, 8};
};

template <> struct Simd<double> {
    using V = float64x2_t;
    static constexpr int lanes = 2;
    static V zero() { return vdupq_n_f64(0); }
    static V set1(double a) { return vdupq_n_f64(a); }
    static V load(const double *p) { return vld1q_f64(p); }
    static void store(double *p, V a) { vst1q_f64(p, a); }
    static V add(V a, V b) { return vaddq_f64(a, b); }
    static V load_at(const double *p, const int32_t *at) {
        return vcombine_f64(vld1_f64(p + at[0]), vld1_f64(p + at[1]));
    }
    static V load_first_at(const double *p, const int32_t *at, int64_t n) { return load_lanes_at<V>(p, at, n); }
    static V fma(V a, V b, V c) { return vfmaq_f64(c, a, b); }
    static V load_first(const double *p, int64_t n) {
        return n >= lanes ? load(p) : n == 1 ? vcombine_f64(vld1_f64(p), vdup_n_f64(0)) : zero();
    }
    static void store_first(double *p, V a, int64_t n) {
        if (n >= lanes)
            store(p, a);
        else if (n == 1)
            vst1q_lane_f64(p, a, 0);
    }
    static V larger(V a, V b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
    static uint32_t above(V a, V threshold) {
        return static_cast<uint32_t>(vaddvq_u64(vbicq_u64(vld1q_u64(bit_of_lane), vcleq_f64(a, threshold))));
    }
    static V interleave_low(V a, V b) { return vzip1q_f64(a, b); }
    static V interleave_high(V a, V b) { return vzip2q_f64(a, b); }
    static V expand(const double *packed, uint32_t bits, bool whole) {
        const V side_by_side = whole ? load(packed) : load_first(packed, __builtin_popcount(bits));
        return vreinterpretq_f64_u8(move_bytes(vreinterpretq_u8_f64(side_by_side), byte_orders<8>.expand[bits]));
    }
    static V keep_where(V a, uint32_t bits) {
        const uint64x2_t where = vtstq_u64(vdupq_n_u64(bits), vld1q_u64(bit_of_lane));
        return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(a), where));
    }
    static V move_together(V spread, uint32_t bits) {
        return vreinterpretq_f64_u8(move_bytes(vreinterpretq_u8_f64(spread), byte_orders<8>.compress[bits]));
    }
    static void compress(const double *spread, uint32_t bits, double *packed, bool whole) {
        const V side_by_side = move_together(load(spread), bits);
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static constexpr uint64_t bit_of_lane[lanes] = {1, 2};
};

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define OFFPATH_BFLOAT_PAIRS 1

// Eight bfloat16, or four pairs of them: dot multiplies pair by pair and adds both products to a float lane. The
// instruction takes subnormal numbers for zeros and rounds to odd. A zip of two registers leaves the entries in order,
// so that what undoes the order of other processors' zips has nothing to do.
struct BfloatPairs {
    using V = uint16x8_t;
    static constexpr int entries = 8;
    static V zero() { return vdupq_n_u16(0); }
    static V load(const bfloat16 *p) { return vld1q_u16(&p->bits); }
    static V load_first(const bfloat16 *p, int64_t n) {
        if (n >= entries)
            return load(p);
        bfloat16 a[entries] = {};
        for (int64_t i = 0; i < n; ++i)
            a[i] = p[i];
        return load(a);
    }
    static void store(bfloat16 *p, V a) { vst1q_u16(&p->bits, a); }
    static void store_first(bfloat16 *p, V a, int64_t n) {
        if (n >= entries)
            return store(p, a);
        uint16x4_t rest = vget_low_u16(a);
        if (n & 4) {
            vst1_u16(&p->bits, rest);
            rest = vget_high_u16(a);
            p += 4;
        }
        Simd<float>::store_halves(p, rest, n & 3);
    }
    static V load_where(const bfloat16 *p, uint32_t bits) {
        static constexpr uint16_t bit_of_entry[entries] = {1, 2, 4, 8, 16, 32, 64, 128};
        return vandq_u16(load(p), vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), vld1q_u16(bit_of_entry)));
    }
    static V set1(uint32_t pair) {
        V a = vreinterpretq_u16_u32(vdupq_n_u32(pair));
        // Keeps what is constant from GCC 12, which writes a bfloat16 of 1 as half precision's.
        asm("" : "+w"(a));
        return a;
    }
    static V zip_low(V a, V b) { return vzip1q_u16(a, b); }
    static V zip_high(V a, V b) { return vzip2q_u16(a, b); }
    static float32x4_t unzip_low(float32x4_t low, float32x4_t) { return low; }
    static float32x4_t unzip_high(float32x4_t, float32x4_t high) { return high; }
    static float32x4_t rezip_low(float32x4_t first, float32x4_t) { return first; }
    static float32x4_t rezip_high(float32x4_t, float32x4_t second) { return second; }
    static float32x4_t dot(V a, V b, float32x4_t sum) {
        return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
    }
    static V expand(const bfloat16 *packed, uint32_t bits, bool whole) {
        const V side_by_side = whole ? load(packed) : load_first(packed, __builtin_popcount(bits));
        return vreinterpretq_u16_u8(move_bytes(vreinterpretq_u8_u16(side_by_side), byte_orders<2>.expand[bits]));
    }
    static void compress(V spread, uint32_t bits, bfloat16 *packed, bool whole) {
        const V side_by_side =
            vreinterpretq_u16_u8(move_bytes(vreinterpretq_u8_u16(spread), byte_orders<2>.compress[bits]));
        whole ? store(packed, side_by_side) : store_first(packed, side_by_side, __builtin_popcount(bits));
    }
    static void compress(const bfloat16 *spread, uint32_t bits, bfloat16 *packed, bool whole) {
        compress(load(spread), bits, packed, whole);
    }
    static V interleave_low(V a, V b) { return zip_low(a, b); }
    static V interleave_high(V a, V b) { return zip_high(a, b); }
    static uint32_t pair_at(const bfloat16 *p) {
        uint32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return pair;
    }
    // The lower / upper four entries.
    static float32x4_t widen_low(V a) { return Simd<float>::widen_halves(vget_low_u16(a)); }
    static float32x4_t widen_high(V a) { return Simd<float>::widen_halves(vget_high_u16(a)); }
    // Both, rounded.
    static V narrow(float32x4_t low, float32x4_t high) {
        return vcombine_u16(Simd<float>::narrow_halves(low), Simd<float>::narrow_halves(high));
    }
    static float32x4_t as_floats(V a) { return vreinterpretq_f32_u16(a); }
    static V as_pairs(float32x4_t a) { return vreinterpretq_u16_f32(a); }
    static V order_for_zip(V a) { return a; }
    static constexpr int64_t first_of_pair(int64_t i) { return 2 * i; }
};

#endif

} // namespace
