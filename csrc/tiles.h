// Builds the plan of the weight gradient from canonical CSR.
#pragma once

#include "table.h"

#include <memory>
#include <vector>

namespace offpath {

class Tiles {
  public:
    // The activations of so many rows fill half of the second-level cache.
    static constexpr int64_t most_rows = 1024;

    // O(nnz + rows + columns) work, split over the threads by rows and by tiles.
    Tiles(const Csr &csr, int64_t columns, int threads, int64_t tile_rows = most_rows);

    TilePlan view() const;
    int64_t nnz() const { return connections; }
    int64_t bytes() const;

    const int64_t rows, columns;

  private:
    void count_tile(int64_t tile);
    void fill_tile(int64_t tile, const Csr &csr);
    template <class Body> void each_run(int64_t tile, const Body &body) const;
    std::vector<int32_t> runs_of_length(int64_t tile) const;

    const int64_t connections, tile_rows, tile_width, tiles_across, tiles;
    std::vector<int32_t> segment_begin, run_begin, connection_begin;
    std::unique_ptr<int32_t[]> starts; // [rows, tiles_across + 1], while the plan is being made
    std::unique_ptr<TileSegment[]> segments;
    std::unique_ptr<TileRun[]> runs;
    std::unique_ptr<uint16_t[]> tile_columns;
};

} // namespace offpath
