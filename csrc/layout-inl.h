// How this ISA lays out panels and ordered values. bfloat16 is widened to float on the way into the panels, except
// where the CPU multiplies pairs of it.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// Vectors of the batch in one panel: with six rows of accumulators, as many as the registers of the ISA hold.
#if defined(__AVX512F__)
constexpr int panel_vectors = 4;
#else
constexpr int panel_vectors = 2;
#endif

// Whether multiplying half a register may take half the time, as on a Zen 4, which multiplies a whole one in two.
#if defined(__AVX512F__)
constexpr bool halves_pay = true;
#else
constexpr bool halves_pay = false;
#endif

// How far ahead the values of a few tokens' products are fetched: the processor's own prefetching ends with each page,
// and those of a large matrix lie in memory.
constexpr int64_t prefetched_bytes = 2048;

template <class T> struct Format {
    using Sum = offpath::Sum<T>;
    using Panel = Sum;
    using Value = Sum;
    static constexpr int64_t columns_per_step = 1;
    static constexpr int64_t granule = Simd<Sum>::lanes; // tokens: the width of a panel is a multiple
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
template <> struct Format<bfloat16> {
    using Sum = float;
    using Panel = bfloat16;
    using Value = uint32_t; // the values of two columns
    static constexpr int64_t columns_per_step = 2;
    static constexpr int64_t granule = BfloatPairs::entries;
};
#endif

// The type that T is multiplied as. Kernels that depend on nothing else are compiled once for all dtypes that share it.
template <class T> using Multiplied = typename Format<T>::Panel;

template <class T> constexpr bool in_pairs = Format<T>::columns_per_step == 2;
template <class T> constexpr int64_t panel_width = panel_vectors * Simd<offpath::Sum<T>>::lanes;

// Registers in which the weight gradient keeps one operand: of a convolution, a strip of neighbouring positions.
constexpr int dy_vectors = 8;
template <class T> constexpr int64_t strip_width = dy_vectors * Format<T>::granule;

// Which of `granule` neighbouring tokens stands at step `i` of a panel's column; where columns go in pairs, a step
// holds two neighbours.
template <class T> constexpr int64_t token_of_step(int64_t i) {
    return in_pairs<T> ? 16 * (i / 2 % 2) + 4 * (i / 4) + 2 * (i % 2) : i;
}

// Columns of a panel, the one of zeros included.
template <class T> int64_t panel_columns(int64_t columns) { return columns + Format<T>::columns_per_step - 1; }

// Tokens of the panel that starts at token `begin`, padding included.
template <class T> int64_t width_of_panel(int64_t begin, int64_t batch) {
    constexpr int64_t granule = Format<T>::granule;
    return batch - begin >= panel_width<T> ? panel_width<T> : (batch - begin + granule - 1) / granule * granule;
}

// Where registers are few, a strip of panels whose sums fill half of them is multiplied with runs of connections. Wide
// registers leave less to gain: there, plans are buckets.
#if defined(__AVX512F__)
constexpr int run_panels = 0;
#else
constexpr int run_panels = 8 / panel_vectors;
#endif

template <class T>
constexpr offpath::Layout layout = {static_cast<int32_t>(panel_width<T>),
                                    static_cast<int32_t>(sizeof(typename Format<T>::Panel)),
                                    static_cast<int32_t>(sizeof(typename Format<T>::Value)),
                                    static_cast<int32_t>(Format<T>::columns_per_step),
                                    static_cast<int32_t>(strip_width<T>),
                                    run_panels};

} // namespace
