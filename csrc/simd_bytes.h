// The int8 values of one word of 64 columns, spread to where its bits are set, in registers of the type that their
// products are summed in. One of the files with intrinsics (see simd.h).
#pragma once

#include "reduce-inl.h"
#include "simd.h"

namespace {

// Value i of `packed` to the place of the i-th bit of `bits`, zero elsewhere; reads no more values than there are bits.
#if defined(__AVX512VBMI2__)
using SpreadBytes = __m512i;
inline SpreadBytes spread_bytes(const int8_t *packed, uint64_t bits) {
    const uint64_t first = _bzhi_u64(~uint64_t{0}, static_cast<uint32_t>(__builtin_popcountll(bits)));
    return _mm512_maskz_expand_epi8(bits, _mm512_maskz_loadu_epi8(first, packed));
}
#else
struct SpreadBytes {
    alignas(16) int8_t bytes[64];
};
inline SpreadBytes spread_bytes(const int8_t *packed, uint64_t bits) {
    SpreadBytes spread = {};
#if defined(__aarch64__)
    // Eight columns at a time, as long as eight values may be read.
    const int8_t *end = packed + __builtin_popcountll(bits);
    for (int column = 0; end - packed >= 8; column += 8) {
        const uint8_t here = static_cast<uint8_t>(bits >> column);
        const uint8x16_t pairs = vld1q_u8(byte_orders<2>.expand[here]);
        const uint8x8_t order = vshr_n_u8(vmovn_u16(vreinterpretq_u16_u8(pairs)), 1);
        vst1_s8(spread.bytes + column, vtbl1_s8(vld1_s8(packed), vreinterpret_s8_u8(order)));
        packed += __builtin_popcount(here);
        bits &= ~(uint64_t{0xFF} << column);
    }
#endif
    for (; bits; bits &= bits - 1)
        spread.bytes[__builtin_ctzll(bits)] = *packed++;
    return spread;
}
#endif

// The registers of one word in order; part i holds `columns` of them.
template <class T> struct WidenedWord {
    using S = Simd<offpath::Sum<T>>;
    static constexpr int columns = S::lanes;
    SpreadBytes spread;

    [[gnu::always_inline]] typename S::V part(int i) const {
        // Through memory: that is where the instructions that widen take single quarters from.
        const auto *bytes = reinterpret_cast<const int8_t *>(&spread) + i * columns;
#if defined(__AVX512F__)
        if constexpr (columns == 16)
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes))));
#elif defined(__aarch64__)
        if constexpr (columns == 4) {
            uint32_t four;
            __builtin_memcpy(&four, bytes, sizeof four);
            const int16x8_t shorts = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
            return vcvtq_f32_s32(vmovl_s16(vget_low_s16(shorts)));
        }
#endif
        offpath::Sum<T> widened[columns];
        for (int lane = 0; lane < columns; ++lane)
            widened[lane] = bytes[lane];
        return S::load(widened);
    }
};

// Sums of products of spread values with 64 unsigned bytes that stand for numbers 128 smaller.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI2__)
template <> struct Simd<int32_t> {
    using V = __m512i;
    static constexpr int lanes = 16;
    static V add(V a, V b) { return _mm512_add_epi32(a, b); }
    static V interleave_low(V a, V b) {
        return _mm512_permutex2var_epi32(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                                         b);
    }
    static V interleave_high(V a, V b) {
        return _mm512_permutex2var_epi32(
            a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
    }
};
struct ByteDots {
    using V = __m512i;
    static constexpr int rows = 16; // whose lanes are summed together
    static V zero() { return _mm512_setzero_si512(); }
    static V add(V sum, const uint8_t *bytes, const SpreadBytes &spread) {
        return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(bytes), spread);
    }
    static V add_offset(V sum, const SpreadBytes &spread) {
        return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), spread);
    }
    static V subtract(V a, V b) { return _mm512_sub_epi32(a, b); }
    static void store(V (&of_row)[rows], int32_t *sums) { _mm512_storeu_si512(sums, sum_each<int32_t>(of_row)); }
};
#elif defined(__ARM_FEATURE_MATMUL_INT8)
struct ByteDots {
    using V = int32x4_t;
    static constexpr int rows = 4;
    static V zero() { return vdupq_n_s32(0); }
    static V add(V sum, const uint8_t *bytes, const SpreadBytes &spread) {
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16)
            sum = vusdotq_s32(sum, vld1q_u8(bytes + i), vld1q_s8(spread.bytes + i));
        return sum;
    }
    static V add_offset(V sum, const SpreadBytes &spread) {
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16)
            sum = vusdotq_s32(sum, vdupq_n_u8(128), vld1q_s8(spread.bytes + i));
        return sum;
    }
    static V subtract(V a, V b) { return vsubq_s32(a, b); }
    static void store(V (&of_row)[rows], int32_t *sums) {
        vst1q_s32(sums, vpaddq_s32(vpaddq_s32(of_row[0], of_row[1]), vpaddq_s32(of_row[2], of_row[3])));
    }
};
#else
struct ByteDots {
    using V = int32_t;
    static constexpr int rows = 16;
    static V zero() { return 0; }
    // Out of line: sixteen copies of it in each of sixteen loops would be most of the variant's code.
    [[gnu::noinline]] static V add(V sum, const uint8_t *bytes, const SpreadBytes &spread) {
        for (int c = 0; c < 64; ++c)
            sum += (bytes[c] - 128) * spread.bytes[c];
        return sum;
    }
    static V add_offset(V, const SpreadBytes &) { return 0; }
    static V subtract(V a, V b) { return a - b; }
    static void store(const V (&of_row)[rows], int32_t *sums) {
        for (int i = 0; i < rows; ++i)
            sums[i] = of_row[i];
    }
};
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// Every int8 is a bfloat16. Its halves come from tables over its magnitude; 128, which has no room there, from a mask.
template <> struct WidenedWord<bfloat16> {
    static constexpr int columns = BfloatPairs::entries;
    __m512i halves[2];

    [[gnu::always_inline]] explicit WidenedWord(SpreadBytes spread) {
        struct Tables {
            alignas(64) uint8_t low[128], high[128];
        };
        static constexpr Tables tables = [] {
            Tables made = {};
            for (int i = 0; i < 128; ++i) {
                const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(i));
                made.low[i] = static_cast<uint8_t>(bits >> 16);
                made.high[i] = static_cast<uint8_t>(bits >> 24);
            }
            return made;
        }();
        // Eight columns each: those of the lower half to the lower halves of the lanes, which unpacking takes first.
        spread = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), spread);
        const __m512i magnitude = _mm512_abs_epi8(spread);
        const auto look_up = [&](const uint8_t *table) {
            return _mm512_permutex2var_epi8(_mm512_load_si512(table), magnitude, _mm512_load_si512(table + 64));
        };
        constexpr int a_or_b_and_c = 0xF8;
        const __m512i high =
            _mm512_mask_mov_epi8(look_up(tables.high), _mm512_movepi8_mask(magnitude), _mm512_set1_epi8(0x43));
        const __m512i signed_high = _mm512_ternarylogic_epi32(high, spread, _mm512_set1_epi8(-128), a_or_b_and_c);
        const __m512i low = look_up(tables.low);
        halves[0] = _mm512_unpacklo_epi8(low, signed_high);
        halves[1] = _mm512_unpackhi_epi8(low, signed_high);
    }
    [[gnu::always_inline]] __m512i part(int i) const { return halves[i]; }
};
#elif defined(__aarch64__) && defined(OFFPATH_BFLOAT_PAIRS)
template <> struct WidenedWord<bfloat16> {
    static constexpr int columns = BfloatPairs::entries;
    SpreadBytes spread;

    // Every int8 is a bfloat16: the upper halves of the floats that they are.
    [[gnu::always_inline]] BfloatPairs::V part(int i) const {
        const int16x8_t shorts = vmovl_s8(vld1_s8(spread.bytes + i * columns));
        const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(shorts)));
        const float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(shorts));
        return vuzp2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
    }
};
#endif

} // namespace
