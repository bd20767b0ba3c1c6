// How this ISA lays out panels and ordered values. bfloat16 is widened to float on the way into the panels, except
// where the CPU multiplies pairs of it.
#pragma once

#include "simd.h"
#include "table.h"

namespace {

// Vectors of the batch in one panel: with six rows of accumulators, as many as the registers of the ISA hold.
constexpr int panel_vectors = vector_registers / 8;

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

#ifdef OFFPATH_BFLOAT_PAIRS
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
#ifdef OFFPATH_BFLOAT_PAIRS
    if constexpr (in_pairs<T>)
        return BfloatPairs::first_of_pair(i);
#endif
    return i;
}

// Columns of a panel, the one of zeros included.
template <class T> int64_t panel_columns(int64_t columns) { return columns + Format<T>::columns_per_step - 1; }

// Tokens of the panel that starts at token `begin`, padding included.
template <class T> int64_t width_of_panel(int64_t begin, int64_t batch) {
    constexpr int64_t granule = Format<T>::granule;
    return batch - begin >= panel_width<T> ? panel_width<T> : (batch - begin + granule - 1) / granule * granule;
}

// Neighbouring panels from token `begin` on, at most `most`, that are whole, or made whole by padding.
template <class T> int64_t whole_panels(int64_t begin, int64_t batch, int64_t most) {
    const int64_t whole = (batch - begin + Format<T>::granule - 1) / panel_width<T>;
    return whole < most ? whole : most;
}

// Calls body.template operator()<n>() for a number of 1 to `most` that is known only when it runs.
template <int most, class Body> void with_number(int64_t n, const Body &body) {
    if (n == most)
        body.template operator()<most>();
    else if constexpr (most > 1)
        with_number<most - 1>(n, body);
}

// Where a panel has few tokens, a strip of panels whose sums fill half of the registers is multiplied with runs of
// connections. Wide registers leave less to gain, and columns in pairs want buckets: there, plans are of them.
template <class T>
constexpr int run_panels =
    sizeof(typename Simd<float>::V) == 64 || in_pairs<T> ? 0 : vector_registers / 2 / panel_vectors;

template <class T>
constexpr offpath::Layout layout = {static_cast<int32_t>(panel_width<T>),
                                    static_cast<int32_t>(sizeof(typename Format<T>::Panel)),
                                    static_cast<int32_t>(sizeof(typename Format<T>::Value)),
                                    static_cast<int32_t>(Format<T>::columns_per_step),
                                    static_cast<int32_t>(strip_width<T>),
                                    run_panels<T>};

} // namespace
