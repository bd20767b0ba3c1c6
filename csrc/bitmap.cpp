#include "bitmap.h"
#include "parallel.h"

namespace offpath {

BitMatrix::BitMatrix(const Csr &csr, int64_t columns, int threads)
    : rows(csr.rows), columns(columns), words_per_row((columns + 63) / 64), words(rows * words_per_row),
      crow_indices(csr.crow_indices, csr.crow_indices + csr.rows + 1), slots_of_chunks(rows * chunks()) {
    constexpr int64_t rows_per_task = 64;
    parallel_for((rows + rows_per_task - 1) / rows_per_task, nnz() < serial_work ? 1 : threads, [&](int64_t task) {
        for (int64_t r = task * rows_per_task; r < rows && r < (task + 1) * rows_per_task; ++r) {
            int32_t s = csr.crow_indices[r];
            for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
                slots_of_chunks[r * chunks() + chunk] = s;
                for (; s < csr.crow_indices[r + 1] && csr.col_indices[s] < (chunk + 1) * chunk_columns; ++s)
                    words[r * words_per_row + csr.col_indices[s] / 64] |= uint64_t{1} << csr.col_indices[s] % 64;
            }
        }
    });
}

} // namespace offpath
