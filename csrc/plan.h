// Builds the plan of the bucketed product from canonical CSR.
#pragma once

#include "table.h"

#include <memory>

namespace offpath {

class Plan {
  public:
    // `permutation` (or null) leads from a slot of this CSR to the caller's slot: a transposed matrix is planned over
    // the values of the original. With columns_per_step 2, masks are padded to an even number of columns.
    // O(nnz + rows) work, split over the threads by groups of rows.
    Plan(const Csr &csr, int64_t columns, const int32_t *permutation, int64_t columns_per_step, int threads);

    // Column c becomes begin[c] (and the padding begin[columns]): for products whose columns begin anywhere.
    void place_columns(const int32_t *begin);

    BucketPlan view() const;
    BucketPlan order() const { return view(); } // what `gather` looks at
    bool fits(const Layout &layout) const { return columns_per_step == layout.columns_per_step; }
    int64_t nnz() const { return connections; }
    int64_t slot_count() const { return slot_begin[groups]; }
    int64_t bytes() const;

    const int64_t rows, columns, columns_per_step;

  private:
    struct Workspace;
    void find_masks(int64_t group, const Csr &csr, Workspace &work) const;
    void count_group(int64_t group, const Csr &csr, Workspace &work);
    void fill_group(int64_t group, const Csr &csr, const int32_t *permutation, Workspace &work);

    int64_t groups, connections;
    std::unique_ptr<int32_t[]> mask_counts, column_order, slots, column_begin, slot_begin;
};

} // namespace offpath
