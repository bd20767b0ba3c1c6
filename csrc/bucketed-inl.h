// The bucketed product: for six rows and one panel of the batch, all accumulators stay in registers while the
// columns of the group go by, sorted by mask. For each mask there is a loop of its own without branches: load the
// column of x once (or two columns, where the CPU multiplies pairs), then multiply it into every row of the mask.
#pragma once

#include "groups-inl.h"

#include <utility> // types alone: see variant.cpp

namespace {

// Where the product stands in the streams of a group.
template <class T> struct Cursor {
    const int32_t *counts;
    const int32_t *columns;
    const typename Format<T>::Value *values;
};

template <class T, int vectors, int stride, int mask>
[[gnu::always_inline]] inline void bucket(Accumulators<T, vectors> &acc, Cursor<T> &at,
                                          const typename Format<T>::Panel *panel) {
    constexpr int32_t columns = Format<T>::columns_per_step;
    for (int32_t n = at.counts[mask]; n > 0; n -= columns) {
        Step<T, vectors> step;
        // Columns follow one another at random, so that the processor cannot tell which one it will need. In pairs,
        // fetching ahead costs more than it saves.
        if constexpr (!in_pairs<T>)
            step.template prefetch<stride>(panel, at.columns[offpath::columns_ahead]);
        step.template load<stride>(panel, at.columns);
        at.columns += columns;
#pragma GCC unroll 8
        for (int row = 0; row < offpath::group_rows; ++row)
            if (mask >> row & 1)
                step.multiply(*at.values++, acc[row]);
    }
}

// One group times one panel of `vectors` vectors, whose columns lie `stride` entries apart: known to the compiler,
// since a multiplication for each column costs small products a tenth. Writes the group's rows of the tile.
template <class T, int vectors, int stride = Step<T, vectors>::panel_stride>
[[gnu::noinline]] void bucketed_group(const offpath::BucketPlan &plan, const void *values, int64_t group,
                                      const typename Format<T>::Panel *panel, const offpath::Sum<T> *start,
                                      offpath::Sum<T> *tile) {
    Accumulators<T, vectors> acc;
    start_group<T, vectors>(acc, start);
    Cursor<T> at = {plan.mask_counts + group * offpath::group_masks, plan.column_order + plan.column_begin[group],
                    static_cast<const typename Format<T>::Value *>(values) +
                        plan.slot_begin[group] / Format<T>::columns_per_step};
    // All in one go: a compiler's time grows with the depth of what it inlines.
    [&]<int... masks> [[gnu::always_inline]] (std::integer_sequence<int, masks...>) {
        (bucket<T, vectors, stride, masks + 1>(acc, at, panel), ...);
    }(std::make_integer_sequence<int, offpath::group_masks - 1>());
    store_group<T, vectors>(acc, tile);
}

// Block: rows count groups, batch counts panels.
template <class T> void bucketed(const offpath::bucketed_args<T> &args, const offpath::Block &block) {
    const Output<T> output = {args.y, args.plan.rows, args.batch, args.feature_major};
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t token = panel * panel_width<T>;
        const auto *x =
            static_cast<const typename Format<T>::Panel *>(args.panels) + token * panel_columns<T>(args.plan.columns);
        with_vectors_of_panel<T>(token, args.batch, [&]<int vectors>(Vectors<vectors>) {
            each_group<T, vectors>(
                output, block.row_begin, block.row_end, token, [&](int64_t group, offpath::Sum<T> *tile) {
                    const GroupStart<T> start(args.bias, group, args.plan.rows);
                    bucketed_group<Multiplied<T>, vectors>(args.plan, args.values, group, x, start.of_row, tile);
                });
        });
    }
}

} // namespace
