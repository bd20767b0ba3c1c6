// The AVX-512 instructions that the kernels name, lane by lane, for machines that lack them: included before all else
// where a variant is compiled for AVX2. Each does what Intel's manual (Software Developer's Manual, volume 2) says of
// it, for the immediates that occur. Loads and stores with a mask touch single entries, so the checkers see them.
//
// The functions bear the compiler's names in the anonymous namespace, which is searched first from the kernels' code,
// since that is in it, too.
#pragma once

#include <cstdint>
#include <immintrin.h>

// After the compiler's header, which would take them for its own.
#define __AVX512F__ 1
#define __AVX512DQ__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#if defined(OFFPATH_EMULATE_BF16)
#define __AVX512BF16__ 1
#define __AVX512VBMI__ 1
#define __AVX512VBMI2__ 1
#define __AVX512VNNI__ 1
#endif

namespace {
namespace emulated {

template <class Lane, class V> struct Lanes {
    static constexpr int count = sizeof(V) / sizeof(Lane);
    Lane lane[count];
};
template <class Lane, class V> Lanes<Lane, V> split(V a) { return __builtin_bit_cast(Lanes<Lane, V>, a); }

// A register whose lane i is f(i).
template <class Lane, class V = __m512i, class F> V each(F &&f) {
    Lanes<Lane, V> result;
    for (int i = 0; i < result.count; ++i)
        result.lane[i] = f(i);
    return __builtin_bit_cast(V, result);
}

template <class V> V load(const void *p) {
    V a;
    __builtin_memcpy(&a, p, sizeof(V));
    return a;
}
template <class V> void store(void *p, V a) { __builtin_memcpy(p, &a, sizeof(V)); }
template <class Lane, class V = __m512i> V load_where(uint64_t mask, const void *p) {
    return each<Lane, V>([&](int i) { return mask >> i & 1 ? static_cast<const Lane *>(p)[i] : Lane{}; });
}
template <class Lane, class V> void store_where(void *p, uint64_t mask, V a) {
    const auto from = split<Lane>(a);
    for (int i = 0; i < from.count; ++i)
        if (mask >> i & 1)
            static_cast<Lane *>(p)[i] = from.lane[i];
}
template <class Lane, class V> V select(V otherwise, uint64_t mask, V a) {
    const auto no = split<Lane>(otherwise), yes = split<Lane>(a);
    return each<Lane, V>([&](int i) { return mask >> i & 1 ? yes.lane[i] : no.lane[i]; });
}
template <class Lane, class V> V expand(uint64_t mask, V a) {
    const auto from = split<Lane>(a);
    int next = 0;
    return each<Lane, V>([&](int i) { return mask >> i & 1 ? from.lane[next++] : Lane{}; });
}
template <class Lane, class V> V compress(uint64_t mask, V a) {
    const auto from = split<Lane>(a);
    Lanes<Lane, V> result = {};
    int next = 0;
    for (int i = 0; i < from.count; ++i)
        if (mask >> i & 1)
            result.lane[next++] = from.lane[i];
    return __builtin_bit_cast(V, result);
}
// Of the lanes of each quarter, the first (half 0) or the last (half 1) ones of a and b in turns.
template <class Lane, class V> V unpack(V a, V b, int half) {
    constexpr int in_quarter = 16 / sizeof(Lane);
    const auto left = split<Lane>(a), right = split<Lane>(b);
    return each<Lane, V>([&](int i) {
        const int from = i / in_quarter * in_quarter + half * in_quarter / 2 + i % in_quarter / 2;
        return i % 2 ? right.lane[from] : left.lane[from];
    });
}
template <class Lane, class Index, class V> V permute_two(V a, __m512i where, V b) {
    const auto left = split<Lane>(a), right = split<Lane>(b);
    const auto index = split<Index>(where);
    return each<Lane, V>([&](int i) {
        const int from = static_cast<int>(index.lane[i] & (2 * left.count - 1));
        return from < left.count ? left.lane[from] : right.lane[from - left.count];
    });
}
template <class Lane, class V> uint64_t compare(V a, V b, int predicate) {
    const auto left = split<Lane>(a), right = split<Lane>(b);
    uint64_t mask = 0;
    for (int i = 0; i < left.count; ++i) {
        const Lane x = left.lane[i], y = right.lane[i];
        bool holds;
        if (predicate == _CMP_NLE_UQ)
            holds = !(x <= y);
        else if (predicate == _CMP_UNORD_Q)
            holds = x != x || y != y;
        else
            __builtin_trap();
        mask |= uint64_t{holds} << i;
    }
    return mask;
}
inline bool is_subnormal(uint32_t float_bits) { return !(float_bits & 0x7F800000) && (float_bits & 0x007FFFFF); }
inline float widen_bfloat16(uint16_t a) {
    const uint32_t bits = uint32_t{a} << 16;
    return __builtin_bit_cast(float, is_subnormal(bits) ? bits & 0x80000000 : bits);
}

} // namespace emulated

// Whole registers.
inline __m512 _mm512_loadu_ps(const void *p) { return emulated::load<__m512>(p); }
inline __m512d _mm512_loadu_pd(const void *p) { return emulated::load<__m512d>(p); }
inline __m512i _mm512_loadu_si512(const void *p) { return emulated::load<__m512i>(p); }
inline __m512i _mm512_load_si512(const void *p) { return *static_cast<const __m512i *>(p); }
inline void _mm512_storeu_ps(void *p, __m512 a) { emulated::store(p, a); }
inline void _mm512_storeu_pd(void *p, __m512d a) { emulated::store(p, a); }
inline void _mm512_storeu_si512(void *p, __m512i a) { emulated::store(p, a); }

// Single entries.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *p) {
    return emulated::load_where<float, __m512>(mask, p);
}
inline __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const void *p) {
    return emulated::load_where<double, __m512d>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *p) { return emulated::load_where<int>(mask, p); }
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *p) { return emulated::load_where<short>(mask, p); }
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void *p) {
    return emulated::load_where<signed char>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi32(__mmask8 mask, const void *p) {
    return emulated::load_where<int, __m256i>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *p) {
    return emulated::load_where<short, __m256i>(mask, p);
}
inline void _mm512_mask_storeu_ps(void *p, __mmask16 mask, __m512 a) { emulated::store_where<float>(p, mask, a); }
inline void _mm512_mask_storeu_pd(void *p, __mmask8 mask, __m512d a) { emulated::store_where<double>(p, mask, a); }
inline void _mm512_mask_storeu_epi16(void *p, __mmask32 mask, __m512i a) { emulated::store_where<short>(p, mask, a); }
inline void _mm256_mask_storeu_epi16(void *p, __mmask16 mask, __m256i a) { emulated::store_where<short>(p, mask, a); }
inline __m512 _mm512_mask_i32gather_ps(__m512 otherwise, __mmask16 mask, __m512i where, const void *p, int) {
    const auto index = emulated::split<int>(where);
    const auto no = emulated::split<float>(otherwise);
    return emulated::each<float, __m512>(
        [&](int i) { return mask >> i & 1 ? static_cast<const float *>(p)[index.lane[i]] : no.lane[i]; });
}
inline __m512d _mm512_mask_i32gather_pd(__m512d otherwise, __mmask8 mask, __m256i where, const void *p, int) {
    const auto index = emulated::split<int>(where);
    const auto no = emulated::split<double>(otherwise);
    return emulated::each<double, __m512d>(
        [&](int i) { return mask >> i & 1 ? static_cast<const double *>(p)[index.lane[i]] : no.lane[i]; });
}

// Numbers.
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512d _mm512_setzero_pd() { return __m512d{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float a) { return __m512{} + a; }
inline __m512d _mm512_set1_pd(double a) { return __m512d{} + a; }
inline __m512i _mm512_set1_epi32(int a) {
    return emulated::each<int>([&](int) { return a; });
}
inline __m512i _mm512_set1_epi8(signed char a) {
    return emulated::each<signed char>([&](int) { return a; });
}
// The last lane first; the compiler's macro _mm512_setr_* turns its arguments round for them.
template <class... Lane> __m512i _mm512_set_epi32(Lane... from_last) {
    const int lanes[] = {from_last...};
    static_assert(sizeof lanes == sizeof(__m512i));
    return emulated::each<int>([&](int i) { return lanes[15 - i]; });
}
template <class... Lane> __m512i _mm512_set_epi64(Lane... from_last) {
    const int64_t lanes[] = {from_last...};
    static_assert(sizeof lanes == sizeof(__m512i));
    return emulated::each<int64_t>([&](int i) { return lanes[7 - i]; });
}
inline __m512d _mm512_set_pd(double h, double g, double f, double e, double d, double c, double b, double a) {
    return __m512d{a, b, c, d, e, f, g, h};
}

// Sums and products; two halves at a time where AVX2 has the instruction.
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512d _mm512_add_pd(__m512d a, __m512d b) { return a + b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto x = emulated::split<__m256>(a), y = emulated::split<__m256>(b), sum = emulated::split<__m256>(c);
    return emulated::each<__m256, __m512>([&](int i) { return _mm256_fmadd_ps(x.lane[i], y.lane[i], sum.lane[i]); });
}
inline __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
    const auto x = emulated::split<__m256d>(a), y = emulated::split<__m256d>(b), sum = emulated::split<__m256d>(c);
    return emulated::each<__m256d, __m512d>([&](int i) { return _mm256_fmadd_pd(x.lane[i], y.lane[i], sum.lane[i]); });
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
inline __m512d _mm512_max_pd(__m512d a, __m512d b) { return a > b ? a : b; }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    const auto x = emulated::split<uint32_t>(a), y = emulated::split<uint32_t>(b);
    return emulated::each<uint32_t>([&](int i) { return x.lane[i] + y.lane[i]; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    const auto x = emulated::split<uint32_t>(a), y = emulated::split<uint32_t>(b);
    return emulated::each<uint32_t>([&](int i) { return x.lane[i] - y.lane[i]; });
}
inline __m512i _mm512_abs_epi8(__m512i a) {
    const auto from = emulated::split<signed char>(a);
    return emulated::each<uint8_t>([&](int i) {
        const int entry = from.lane[i];
        return static_cast<uint8_t>(entry < 0 ? -entry : entry);
    });
}
// Unsigned bytes of a by signed ones of b.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    const auto sums = emulated::split<uint32_t>(sum);
    const auto x = emulated::split<uint8_t>(a);
    const auto y = emulated::split<signed char>(b);
    return emulated::each<uint32_t>([&](int i) {
        int dot = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j)
            dot += x.lane[j] * y.lane[j];
        return sums.lane[i] + static_cast<uint32_t>(dot);
    });
}
#if defined(OFFPATH_EMULATE_BF16)
namespace emulated {
// The second of each pair first; subnormal operands and results are zeros.
template <class V, class Pairs> V dot_of_pairs(V sum, Pairs a, Pairs b) {
    const auto sums = split<uint32_t>(sum);
    const auto x = split<uint16_t>(a), y = split<uint16_t>(b);
    const auto flushed = [](float result) {
        const auto bits = __builtin_bit_cast(uint32_t, result);
        return __builtin_bit_cast(float, is_subnormal(bits) ? bits & 0x80000000 : bits);
    };
    return each<float, V>([&](int i) {
        float total = flushed(__builtin_bit_cast(float, sums.lane[i]));
        for (int j = 2 * i + 1; j >= 2 * i; --j)
            total = flushed(__builtin_fmaf(widen_bfloat16(x.lane[j]), widen_bfloat16(y.lane[j]), total));
        return total;
    });
}
} // namespace emulated
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) { return emulated::dot_of_pairs(sum, a, b); }
inline __m256 _mm256_dpbf16_ps(__m256 sum, __m256bh a, __m256bh b) { return emulated::dot_of_pairs(sum, a, b); }
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
    const auto from = emulated::split<uint32_t>(a);
    return emulated::each<uint16_t, __m256bh>([&](int i) {
        const uint32_t bits = from.lane[i];
        if ((bits & 0x7FFFFFFF) > 0x7F800000) // NaN, made quiet
            return static_cast<uint16_t>(bits >> 16 | 0x0040);
        if (emulated::is_subnormal(bits))
            return static_cast<uint16_t>(bits >> 16 & 0x8000);
        return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    });
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
    const __m256bh halves[2] = {_mm512_cvtneps_pbh(b), _mm512_cvtneps_pbh(a)};
    __m512bh both;
    __builtin_memcpy(&both, halves, sizeof both);
    return both;
}
#endif

// Bits.
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i a, int bits) {
    const auto from = emulated::split<uint32_t>(a);
    return emulated::each<uint32_t>([&](int i) { return from.lane[i] << bits; });
}
inline __m512i _mm512_srli_epi32(__m512i a, int bits) {
    const auto from = emulated::split<uint32_t>(a);
    return emulated::each<uint32_t>([&](int i) { return from.lane[i] >> bits; });
}
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i result = {};
    for (int row = 0; row < 8; ++row)
        if (table >> row & 1)
            result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
}

// Masks.
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    return static_cast<__mmask16>(emulated::compare<float>(a, b, predicate));
}
inline __mmask8 _mm512_cmp_pd_mask(__m512d a, __m512d b, int predicate) {
    return static_cast<__mmask8>(emulated::compare<double>(a, b, predicate));
}
inline __mmask16 _mm512_fpclass_ps_mask(__m512 a, int classes) {
    constexpr int nan_or_subnormal = 0x01 | 0x20 | 0x80;
    if (classes != nan_or_subnormal)
        __builtin_trap();
    const auto from = emulated::split<uint32_t>(a);
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i)
        mask |= static_cast<uint32_t>((from.lane[i] & 0x7FFFFFFF) > 0x7F800000 || emulated::is_subnormal(from.lane[i]))
                << i;
    return static_cast<__mmask16>(mask);
}
inline __mmask64 _mm512_movepi8_mask(__m512i a) {
    const auto from = emulated::split<signed char>(a);
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i)
        mask |= uint64_t{from.lane[i] < 0} << i;
    return mask;
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return emulated::select<float>(__m512{}, mask, a); }
inline __m512d _mm512_maskz_mov_pd(__mmask8 mask, __m512d a) { return emulated::select<double>(__m512d{}, mask, a); }
inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i a) {
    return emulated::select<int>(otherwise, mask, a);
}
inline __m512i _mm512_mask_mov_epi8(__m512i otherwise, __mmask64 mask, __m512i a) {
    return emulated::select<signed char>(otherwise, mask, a);
}
inline __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 a) { return emulated::expand<float>(mask, a); }
inline __m512d _mm512_maskz_expand_pd(__mmask8 mask, __m512d a) { return emulated::expand<double>(mask, a); }
inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i a) { return emulated::expand<short>(mask, a); }
inline __m512i _mm512_maskz_expand_epi8(__mmask64 mask, __m512i a) { return emulated::expand<signed char>(mask, a); }
inline __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 a) { return emulated::compress<float>(mask, a); }
inline __m512d _mm512_maskz_compress_pd(__mmask8 mask, __m512d a) { return emulated::compress<double>(mask, a); }
inline __m512i _mm512_maskz_compress_epi16(__mmask32 mask, __m512i a) { return emulated::compress<short>(mask, a); }

// Lanes elsewhere.
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return emulated::unpack<float>(a, b, 0); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return emulated::unpack<float>(a, b, 1); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return emulated::unpack<double>(a, b, 0); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return emulated::unpack<double>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return emulated::unpack<short>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return emulated::unpack<short>(a, b, 1); }
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return emulated::unpack<signed char>(a, b, 0); }
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return emulated::unpack<signed char>(a, b, 1); }
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i where, __m512 b) {
    return emulated::permute_two<float, int>(a, where, b);
}
inline __m512d _mm512_permutex2var_pd(__m512d a, __m512i where, __m512d b) {
    return emulated::permute_two<double, int64_t>(a, where, b);
}
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i where, __m512i b) {
    return emulated::permute_two<short, short>(a, where, b);
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i where, __m512i b) {
    return emulated::permute_two<int, int>(a, where, b);
}
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i where, __m512i b) {
    return emulated::permute_two<uint8_t, uint8_t>(a, where, b);
}
inline __m512i _mm512_permutexvar_epi64(__m512i where, __m512i a) {
    return emulated::permute_two<int64_t, int64_t>(a, where & 7, a);
}

// Other widths.
inline __m512 _mm512_castps256_ps512(__m256 a) {
    return emulated::each<__m256, __m512>([&](int i) { return i == 0 ? a : __m256{}; });
}
inline __m512d _mm512_castpd256_pd512(__m256d a) {
    return emulated::each<__m256d, __m512d>([&](int i) { return i == 0 ? a : __m256d{}; });
}
inline __m256 _mm512_castps512_ps256(__m512 a) { return emulated::split<__m256>(a).lane[0]; }
inline __m256d _mm512_castpd512_pd256(__m512d a) { return emulated::split<__m256d>(a).lane[0]; }
inline __m256i _mm512_castsi512_si256(__m512i a) { return emulated::split<__m256i>(a).lane[0]; }
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) { return emulated::split<__m256>(a).lane[half]; }
inline __m512 _mm512_insertf32x8(__m512 a, __m256 b, int half) {
    auto halves = emulated::split<__m256>(a);
    halves.lane[half] = b;
    return __builtin_bit_cast(__m512, halves);
}
inline __m512 _mm512_zextps128_ps512(__m128 a) {
    return emulated::each<__m128, __m512>([&](int i) { return i == 0 ? a : __m128{}; });
}
inline __m512d _mm512_castps_pd(__m512 a) { return __builtin_bit_cast(__m512d, a); }
inline __m512 _mm512_castpd_ps(__m512d a) { return __builtin_bit_cast(__m512, a); }
inline __m512i _mm512_castps_si512(__m512 a) { return __builtin_bit_cast(__m512i, a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return __builtin_bit_cast(__m512, a); }
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    const auto from = emulated::split<signed char>(a);
    return emulated::each<int>([&](int i) { return from.lane[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const auto from = emulated::split<uint16_t>(a);
    return emulated::each<uint32_t>([&](int i) { return from.lane[i]; });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    const auto from = emulated::split<uint32_t>(a);
    return emulated::each<uint16_t, __m256i>([&](int i) { return static_cast<uint16_t>(from.lane[i]); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    const auto from = emulated::split<int>(a);
    return emulated::each<float, __m512>([&](int i) { return static_cast<float>(from.lane[i]); });
}

} // namespace
