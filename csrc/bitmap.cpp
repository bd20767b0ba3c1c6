#include "bitmap.h"
#include "parallel.h"

#include <bit>

namespace offpath {

BitMatrix::BitMatrix(const Csr &csr, int64_t columns, int threads)
    : rows(csr.rows), columns(columns), words_per_row((columns + 63) / 64), words(rows * words_per_row),
      crow_indices(csr.crow_indices, csr.crow_indices + csr.rows + 1), slots_of_chunks(rows * chunks()) {
    by_rows(rows, nnz() < serial_work ? 1 : threads, [&](const Block &block) {
        for (int64_t r = block.row_begin; r < block.row_end; ++r) {
            int32_t s = csr.crow_indices[r];
            for (int64_t chunk = 0; chunk < chunks(); ++chunk) {
                slots_of_chunks[r * chunks() + chunk] = s;
                for (; s < csr.crow_indices[r + 1] && csr.col_indices[s] < (chunk + 1) * chunk_columns; ++s)
                    words[r * words_per_row + csr.col_indices[s] / 64] |= uint64_t{1} << csr.col_indices[s] % 64;
            }
        }
    });
}

void BitMatrix::write_columns(int32_t *col_indices, int threads) const {
    by_rows(rows, nnz() < serial_work ? 1 : threads, [&](const Block &block) {
        int32_t *next = col_indices + crow_indices[block.row_begin]; // the rows of a block follow one another
        for (int64_t i = block.row_begin * words_per_row; i < block.row_end * words_per_row; ++i)
            for (uint64_t word = words[i]; word != 0; word &= word - 1)
                *next++ = static_cast<int32_t>(i % words_per_row * 64 + std::countr_zero(word));
    });
}

} // namespace offpath
