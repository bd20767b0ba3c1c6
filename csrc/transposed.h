// Sparse rows seen from their columns: which rows use each.
#pragma once

#include "scratch.h"
#include "table.h"

namespace offpath {

// Whether the rows follow one another from 0 to nnz and every index is in [0, columns).
bool rows_fit(const Csr &rows, int64_t nnz, int64_t columns);

// counts[c] = how many of the indices are c.
void count_indices(const int32_t *indices, int64_t nnz, int64_t columns, int32_t *counts);

// A stable counting sort by index: the entries of a column stand in the order of their rows, so that sums over them do
// not depend on anything else. The rows may be a part of others: the first need not begin at entry 0.
class Transposed {
  public:
    Transposed(const Csr &rows, int64_t columns);
    Csr view() const { return {crow_indices.get(), row_of_entry.get(), columns}; }
    // What the entries have, in the order of the columns.
    template <class T> Scratch<T> order(const T *values) const {
        auto ordered = scratch<T>(nnz);
        for (int64_t s = 0; s < nnz; ++s)
            ordered[s] = values[slots[s]];
        return ordered;
    }

    const int64_t columns, nnz;
    const Scratch<int32_t> crow_indices, row_of_entry, slots; // slots: which entry of the rows stands here
};

} // namespace offpath
