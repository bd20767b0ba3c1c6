#include "transposed.h"

#include <algorithm>

namespace offpath {

bool rows_fit(const Csr &rows, int64_t nnz, int64_t columns) {
    if (rows.crow_indices[0] != 0 || rows.crow_indices[rows.rows] != nnz)
        return false;
    bool fits = true;
    for (int64_t r = 0; r < rows.rows; ++r)
        fits &= rows.crow_indices[r] <= rows.crow_indices[r + 1];
    // As unsigned numbers, negative ones are larger than every column.
    uint32_t largest = 0;
    for (int64_t s = 0; s < nnz; ++s)
        largest = std::max(largest, static_cast<uint32_t>(rows.col_indices[s]));
    return fits && (nnz == 0 || largest < static_cast<uint64_t>(columns));
}

void count_indices(const int32_t *indices, int64_t nnz, int64_t columns, int32_t *counts) {
    std::fill_n(counts, columns, 0);
    for (int64_t s = 0; s < nnz; ++s)
        ++counts[indices[s]];
}

Transposed::Transposed(const Csr &rows, int64_t columns)
    : columns(columns), nnz(rows.crow_indices[rows.rows] - rows.crow_indices[0]),
      crow_indices(scratch<int32_t>(columns + 1)), row_of_entry(scratch<int32_t>(nnz)), slots(scratch<int32_t>(nnz)) {
    // Where the next entry of each column goes; when all are placed, that is where the next column begins.
    int32_t *next = crow_indices.get() + 1;
    count_indices(rows.col_indices + rows.crow_indices[0], nnz, columns, next);
    crow_indices[0] = 0;
    for (int64_t c = 0, begin = 0; c < columns; ++c) {
        const int32_t count = next[c];
        next[c] = static_cast<int32_t>(begin);
        begin += count;
    }
    for (int64_t row = 0; row < rows.rows; ++row)
        for (int64_t s = rows.crow_indices[row]; s < rows.crow_indices[row + 1]; ++s) {
            const int32_t place = next[rows.col_indices[s]]++;
            row_of_entry[place] = static_cast<int32_t>(row);
            slots[place] = static_cast<int32_t>(s);
        }
}

} // namespace offpath
