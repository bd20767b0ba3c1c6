// Builds the plan of the bucketed product from canonical CSR.
#pragma once

#include "table.h"

#include <memory>

namespace offpath {

class Plan {
  public:
    // `permutation` (or null) leads from a slot of this CSR to the caller's slot: a transposed matrix is planned over
    // the values of the original. O(nnz + rows) work, split over the threads by groups of rows.
    Plan(const Csr &csr, int64_t columns, const int32_t *permutation, int threads);

    BucketPlan view() const;
    int64_t nnz() const { return group_begin[groups]; }
    int64_t bytes() const;

    // ordered[i] = values[slots[i]], for the share of one task of gather_tasks().
    template <class T> void gather(const T *values, T *ordered, int64_t task) const;
    int64_t gather_tasks() const;

  private:
    struct Workspace;
    void plan_group(int64_t group, const Csr &csr, const int32_t *permutation, Workspace &work);

    int64_t rows, columns, groups;
    std::unique_ptr<int32_t[]> mask_counts, column_order, slots, group_begin;
};

} // namespace offpath
