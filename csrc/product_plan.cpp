#include "product_plan.h"

namespace offpath {
namespace {

// Values that are put in order in one go.
constexpr int64_t slots_per_group = 256;
// At 90 % of all connections buckets were faster, at 80 % runs (1024 x 1024, 256 tokens, AVX2 of an EPYC 7003).
constexpr double most_runs = 0.85;

} // namespace

Runs::Runs(const Csr &csr, int64_t columns, const int32_t *permutation, int threads)
    : tiles(csr, columns, threads, run_rows) {
    if (permutation)
        slots.assign(permutation, permutation + nnz());
    for (int64_t slot = 0; slot < nnz(); slot += slots_per_group)
        slot_begin.push_back(static_cast<int32_t>(slot));
    slot_begin.push_back(static_cast<int32_t>(nnz()));
}

BucketPlan Runs::order() const {
    BucketPlan order = {};
    order.slots = slots.empty() ? nullptr : slots.data();
    order.slot_begin = slot_begin.data();
    order.groups = static_cast<int64_t>(slot_begin.size()) - 1;
    return order;
}

int64_t Runs::bytes() const {
    return tiles.bytes() + static_cast<int64_t>(sizeof(int32_t) * (slots.size() + slot_begin.size()));
}

ProductPlan::ProductPlan(const Csr &csr, int64_t columns, const int32_t *permutation, const Layout &layout, int threads)
    : rows(csr.rows), columns(columns), nnz(csr.crow_indices[csr.rows]) {
    if (layout.run_panels && static_cast<double>(nnz) < most_runs * static_cast<double>(rows * columns))
        runs = std::make_unique<Runs>(csr, columns, permutation, threads);
    else
        buckets = std::make_unique<Plan>(csr, columns, permutation, layout.columns_per_step, threads);
}

bool ProductPlan::fits(const Layout &layout) const { return runs ? layout.run_panels > 0 : buckets->fits(layout); }

} // namespace offpath
