// Puts the caller's values in the order in which the bucketed product uses them.
#pragma once

#include "layout-inl.h"
#include "table.h"

namespace {

// `values` of T, or of a type whose every value T can hold.
template <class T, class Value>
void gather_values(const offpath::BucketPlan &plan, const Value *values, void *destination,
                   const offpath::Block &block) {
    if constexpr (!in_pairs<T>) {
        auto *ordered = static_cast<typename Format<T>::Value *>(destination);
        const int64_t end = plan.slot_begin[block.row_end];
        for (int64_t i = plan.slot_begin[block.row_begin]; i < end; ++i)
            ordered[i] = compute(values[plan.slots ? plan.slots[i] : i]);
    } else {
        // The rows of two columns of one mask: the first column's value in the lower half, the second's in the upper.
        for (int64_t group = block.row_begin; group < block.row_end; ++group) {
            const int32_t *slots = plan.slots + plan.slot_begin[group];
            uint32_t *ordered = static_cast<uint32_t *>(destination) + plan.slot_begin[group] / 2;
            for (int mask = 1; mask < offpath::group_masks; ++mask) {
                const int rows = __builtin_popcount(mask);
                for (int32_t pair = plan.mask_counts[group * offpath::group_masks + mask] / 2; pair > 0; --pair) {
                    for (int row = 0; row < rows; ++row) {
                        const int32_t first = slots[row], second = slots[rows + row];
                        const uint32_t high = second < 0 ? 0 : as_bfloat16(values[second]).bits;
                        *ordered++ = as_bfloat16(values[first]).bits | high << 16;
                    }
                    slots += 2 * rows;
                }
            }
        }
    }
}

template <class T> void gather(const offpath::gather_args<T> &args, const offpath::Block &block) {
    gather_values<T>(args.plan, args.values, args.ordered, block);
}

} // namespace
