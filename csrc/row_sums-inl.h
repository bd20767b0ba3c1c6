// The bias gradient: sums over the batch of what lies in panels.
#pragma once

#include "batch-inl.h"
#include "layout-inl.h"
#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

template <class T> void row_sums(const offpath::row_sums_args<T> &args, const offpath::Block &block) {
    using B = BatchVector<T>;
    using S = Simd<offpath::Sum<T>>;
    constexpr int together = summed_together<offpath::Sum<T>>;
    const auto *panels = static_cast<const typename Format<T>::Panel *>(args.dy);
    for (int64_t first = block.row_begin; first < block.row_end; first += together) {
        const int64_t rows = block.row_end - first < together ? block.row_end - first : together;
        typename S::V acc[together];
        for (int r = 0; r < together; ++r)
            acc[r] = S::zero();
        for (int64_t token = 0; token < args.batch; token += panel_width<T>) {
            const int64_t width = width_of_panel<T>(token, args.batch);
            const auto *panel = panels + token * panel_columns<T>(args.rows) + first * width;
            for (int64_t t = 0; t < width; t += B::tokens)
                for (int64_t r = 0; r < rows; ++r)
                    acc[r] = B::multiply_add(B::ones(), B::load(panel + r * width + t), acc[r]);
        }
        S::store_first(args.sums + first, sum_some<offpath::Sum<T>>(acc), rows);
    }
}

} // namespace
