// Puts the caller's values in the order in which the products over plans use them.
#pragma once

#include "layout-inl.h"
#include "table.h"

namespace {

// Two neighbouring slots in one load. Left to itself, the compiler fetches values by gather instructions, which are
// slower than loads one by one on a Zen 4.
struct TwoSlots {
    int64_t first, second;

    explicit TwoSlots(const int32_t *slots) {
        static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves below are those of a little-endian CPU");
        uint64_t both;
        __builtin_memcpy(&both, slots, sizeof both);
        first = static_cast<uint32_t>(both);
        second = static_cast<int64_t>(both) >> 32;
    }
};

// `values` of T, or of a type whose every value T can hold.
template <class T, class Value>
void gather_values(const offpath::BucketPlan &plan, const Value *values, void *destination,
                   const offpath::Block &block) {
    int64_t i = plan.slot_begin[block.row_begin];
    const int64_t end = plan.slot_begin[block.row_end];
    auto *ordered = static_cast<typename Format<T>::Value *>(destination) + i / Format<T>::columns_per_step;
    if constexpr (in_pairs<T>) {
        // A column's value in the lower half, that of its neighbour, which may be padding, in the upper.
        for (; i < end; i += 2) {
            const TwoSlots slots(plan.slots + i);
            const int64_t padding = slots.second >> 63; // all ones, or zero
            const uint32_t first = as_bfloat16(values[slots.first]).bits;
            const uint32_t second = as_bfloat16(values[slots.second & ~padding]).bits & ~padding;
            *ordered++ = first | second << 16;
        }
    } else if (!plan.slots) {
        for (; i < end; ++i)
            *ordered++ = compute(values[i]);
    } else {
        for (; i + 1 < end; i += 2) {
            const TwoSlots slots(plan.slots + i);
            *ordered++ = compute(values[slots.first]);
            *ordered++ = compute(values[slots.second]);
        }
        if (i < end)
            *ordered = compute(values[plan.slots[i]]);
    }
}

template <class T> void gather(const offpath::gather_args<T> &args, const offpath::Block &block) {
    gather_values<T>(args.plan, args.values, args.ordered, block);
}

} // namespace
