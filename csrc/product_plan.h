// What the products over a plan go through: buckets, or runs where the variant multiplies those.
#pragma once

#include "plan.h"
#include "tiles.h"

#include <memory>
#include <vector>

namespace offpath {

// A pattern in runs, and where their values come from.
class Runs {
  public:
    // The same arguments as those of a Plan.
    Runs(const Csr &csr, int64_t columns, const int32_t *permutation, int threads);

    TilePlan view() const { return tiles.view(); }
    // Of a plan of buckets, what `gather` looks at: the slots, null where the values stand in order, in groups.
    BucketPlan order() const;
    int64_t nnz() const { return tiles.nnz(); }
    int64_t bytes() const;

  private:
    const Tiles tiles;
    std::vector<int32_t> slots, slot_begin;
};

class ProductPlan {
  public:
    // Nearly dense rows have columns in common, of which buckets make more.
    ProductPlan(const Csr &csr, int64_t columns, const int32_t *permutation, const Layout &layout, int threads);

    BucketPlan order() const { return runs ? runs->order() : buckets->view(); }
    int64_t slot_count() const { return runs ? runs->nnz() : buckets->slot_count(); }
    int64_t bytes() const { return runs ? runs->bytes() : buckets->bytes(); }
    bool fits(const Layout &layout) const;

    const int64_t rows, columns, nnz;
    std::unique_ptr<const Plan> buckets; // or runs
    std::unique_ptr<const Runs> runs;
};

} // namespace offpath
