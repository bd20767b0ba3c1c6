// A pattern as a matrix of bits.
#pragma once

#include "table.h"

#include <cstdint>
#include <vector>

namespace offpath {

class BitMatrix {
  public:
    BitMatrix(const Csr &csr, int64_t columns, int threads);

    Bitmap view() const { return {words.data(), crow_indices.data(), rows, columns, words_per_row}; }
    // The slot at which each chunk of each row begins: [rows, chunks].
    const int32_t *chunk_slots() const { return slots_of_chunks.data(); }
    int64_t chunks() const { return (columns + chunk_columns - 1) / chunk_columns; }
    int64_t bytes() const {
        return static_cast<int64_t>(words.size() * 8 + (crow_indices.size() + slots_of_chunks.size()) * 4);
    }
    int64_t nnz() const { return crow_indices[rows]; }
    // The column of each connection, [nnz]: what the bits were made of.
    void write_columns(int32_t *col_indices, int threads) const;

    const int64_t rows, columns;

  private:
    const int64_t words_per_row;
    std::vector<uint64_t> words;
    std::vector<int32_t> crow_indices, slots_of_chunks;
};

} // namespace offpath
