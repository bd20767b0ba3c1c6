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
    int64_t bytes() const { return static_cast<int64_t>(words.size() * 8 + crow_indices.size() * 4); }
    int64_t nnz() const { return crow_indices[rows]; }

    const int64_t rows, columns;

  private:
    const int64_t words_per_row;
    std::vector<uint64_t> words;
    std::vector<int32_t> crow_indices;
};

} // namespace offpath
