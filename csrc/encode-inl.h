// Scores and selection in one: a dense product whose results are compared in registers and hardly ever stored.
#pragma once

#include "filled-inl.h"

namespace {

// The values that one step multiplies: neighbours where columns go in pairs.
template <class T> [[gnu::always_inline]] inline typename Format<T>::Value step_values(const T *weight) {
    if constexpr (in_pairs<T>) {
        typename Format<T>::Value pair;
        __builtin_memcpy(&pair, weight, sizeof pair);
        return pair;
    } else {
        return compute(*weight);
    }
}

// Six rows of a dense weight times all columns of a panel.
template <class T, int vectors>
[[gnu::always_inline]] inline void multiply_rows(Accumulators<T, vectors> &acc,
                                                 const T *const (&weight)[offpath::group_rows],
                                                 const typename Format<T>::Panel *panel, int64_t columns) {
    constexpr int64_t step = Format<T>::columns_per_step;
    const auto multiply = [&] [[gnu::always_inline]] (int32_t column, const auto &values_of) {
        const int32_t together[] = {column, column + 1};
        Step<T, vectors> x;
        x.load(panel, together);
#pragma GCC unroll 8
        for (int row = 0; row < offpath::group_rows; ++row)
            x.multiply(values_of(weight[row] + column), acc[row]);
    };
    int32_t column = 0;
    for (; column + step <= columns; column += step)
        multiply(column, [] [[gnu::always_inline]] (const T *weight) { return step_values<T>(weight); });
    if constexpr (in_pairs<T>)
        if (column < columns) // the panel goes on with a column of zeros, the weight with whatever lies behind it
            multiply(column, [] [[gnu::always_inline]] (const T *weight) { return uint32_t{weight->bits}; });
}

// Block: rows are rows of the weight.
template <class T> void encode(const offpath::encode_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    using Panel = typename Format<T>::Panel;
    const auto *x = static_cast<const Panel *>(args.panel);
    with_vectors_of_panel<T>(0, args.tokens, [&]<int vectors>(Vectors<vectors>) {
        for (int64_t first = block.row_begin; first < block.row_end; first += offpath::group_rows) {
            // Rows behind the last are computed again from the last and not looked at.
            const int64_t rows =
                block.row_end - first < offpath::group_rows ? block.row_end - first : offpath::group_rows;
            const T *weight[offpath::group_rows];
            offpath::Sum<T> start[offpath::group_rows];
            for (int row = 0; row < offpath::group_rows; ++row) {
                const int64_t r = first + (row < rows ? row : rows - 1);
                weight[row] = args.weight.data + r * args.weight.stride;
                start[row] = args.bias ? compute(args.bias[r]) : 0;
            }
            Accumulators<T, vectors> acc;
            start_group<T, vectors>(acc, start);
            multiply_rows<T, vectors>(acc, weight, x, args.width);
#pragma GCC unroll 8
            for (int row = 0; row < offpath::group_rows; ++row)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) {
                    uint32_t bits = S::above(acc[row][v], S::load(args.thresholds + v * S::lanes));
                    if (!bits || row >= rows)
                        continue;
                    alignas(64) offpath::Sum<T> scores[S::lanes];
                    S::store(scores, acc[row][v]);
                    for (; bits; bits &= bits - 1) {
                        const int lane = __builtin_ctz(bits);
                        if (v * S::lanes + lane >= args.tokens)
                            break; // behind the last token are zeros, whose scores may be NaN
                        offpath::Found<offpath::Sum<T>> &found = args.found[v * S::lanes + lane];
                        found.values[found.count] = scores[lane];
                        found.indices[found.count++] = static_cast<int32_t>(first + row);
                    }
                }
        }
    });
}

} // namespace
