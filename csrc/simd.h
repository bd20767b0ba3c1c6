// A vector of T as wide as the ISA this translation unit is compiled for: the only files with intrinsics.
//
// Simd<T> offers: V (the register type), lanes, zero, set1, load, store, fma, load_first / store_first (the first
// n lanes, the rest reads as zero / is left alone), add, interleave_low / interleave_high (a0 b0 a1 b1 ... of the
// lower / upper halves), load_at / load_first_at (one entry for each index), expand (values that stand side by side
// into the lanes whose bit is set, zero elsewhere; a whole register may be read where `whole`), compress (its inverse;
// a whole register may be written where `whole`), move_together (compress in a register), keep_where (zero in the lanes
// whose bit is not set), above (the bits of the lanes that are larger than a threshold, or where one of both is NaN),
// larger (b where a is NaN). Simd<float> also loads, stores, expands and compresses bfloat16. BfloatPairs, where the
// CPU has it (OFFPATH_BFLOAT_PAIRS is defined): registers of bfloat16 whose neighbours are multiplied and added in
// pairs. vector_registers: how many the ISA has. Everything is in an anonymous namespace so that no variant exports
// code to another one.
#pragma once

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif
