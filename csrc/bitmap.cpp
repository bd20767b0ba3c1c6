#include "bitmap.h"
#include "parallel.h"

#include <algorithm>
#include <bit>

namespace offpath {
namespace {

// Calls body(row) for every row.
template <class Body> void each_row(int64_t rows, int threads, const Body &body) {
    constexpr int64_t rows_per_task = 64;
    parallel_for(ceil_div(rows, rows_per_task), threads, [&](int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * rows_per_task);
        for (int64_t row = task * rows_per_task; row < end; ++row)
            body(row);
    });
}

} // namespace

BitMatrix::BitMatrix(const Csr &csr, int64_t columns, int threads)
    : rows(csr.rows), columns(columns), words_per_row((columns + 63) / 64), words(rows * words_per_row),
      crow_indices(csr.crow_indices, csr.crow_indices + csr.rows + 1), slots_of_chunks(rows * chunks()) {
    each_row(rows, nnz() < serial_work ? 1 : threads, [&](int64_t r) {
        int32_t s = csr.crow_indices[r];
        for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
            slots_of_chunks[r * chunks() + chunk] = s;
            for (; s < csr.crow_indices[r + 1] && csr.col_indices[s] < (chunk + 1) * chunk_columns; ++s)
                words[r * words_per_row + csr.col_indices[s] / 64] |= uint64_t{1} << csr.col_indices[s] % 64;
        }
    });
}

void BitMatrix::write_columns(int32_t *col_indices, int threads) const {
    each_row(rows, nnz() < serial_work ? 1 : threads, [&](int64_t row) {
        int32_t *next = col_indices + crow_indices[row];
        for (int64_t w = 0; w < words_per_row; ++w)
            for (uint64_t word = words[row * words_per_row + w]; word != 0; word &= word - 1)
                *next++ = static_cast<int32_t>(w * 64 + std::countr_zero(word));
    });
}

} // namespace offpath
