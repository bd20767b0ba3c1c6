#include "tiles.h"
#include "parallel.h"

#include <algorithm>

namespace offpath {
namespace {

// The activations of 64 columns fill the first-level cache.
constexpr int64_t smallest_width = 64, largest_width = 1 << 16;
// Each run loads its row of dy anew. A wider tile has longer runs, but finds its columns of x in the second-level
// cache.
constexpr int64_t wanted_run_length = 6;

int64_t width_for(const Csr &csr, int64_t columns) {
    const double density = static_cast<double>(csr.crow_indices[csr.rows]) /
                           std::max(1.0, static_cast<double>(csr.rows) * static_cast<double>(columns));
    int64_t width = smallest_width;
    while (width < largest_width && width < columns && static_cast<double>(width) * density < wanted_run_length)
        width *= 2;
    return width;
}

} // namespace

Tiles::Tiles(const Csr &csr, int64_t columns, int threads, int64_t tile_rows)
    : rows(csr.rows), columns(columns), connections(csr.crow_indices[csr.rows]), tile_rows(tile_rows),
      tile_width(width_for(csr, columns)), tiles_across(ceil_div(columns, tile_width)),
      tiles(tiles_across * ceil_div(rows, tile_rows)), segment_begin(tiles + 1), run_begin(tiles + 1),
      connection_begin(tiles + 1), starts(std::make_unique_for_overwrite<int32_t[]>(rows * (tiles_across + 1))) {
    const int workers = connections < serial_work ? 1 : threads;
    by_rows(rows, workers, [&](const Block &block) {
        for (int64_t row = block.row_begin; row < block.row_end; ++row) {
            int32_t *start = &starts[row * (tiles_across + 1)];
            int64_t tile = 0;
            *start = csr.crow_indices[row];
            for (int32_t s = csr.crow_indices[row]; s < csr.crow_indices[row + 1]; ++s)
                for (; tile < csr.col_indices[s] / tile_width; ++tile)
                    start[tile + 1] = s;
            std::fill(start + tile + 1, start + tiles_across + 1, csr.crow_indices[row + 1]);
        }
    });
    parallel_for(tiles, workers, [&](int64_t tile) { count_tile(tile); });
    for (int64_t tile = 0; tile < tiles; ++tile) {
        segment_begin[tile + 1] += segment_begin[tile];
        run_begin[tile + 1] += run_begin[tile];
        connection_begin[tile + 1] += connection_begin[tile];
    }
    segments = std::make_unique_for_overwrite<TileSegment[]>(segment_begin[tiles]);
    runs = std::make_unique_for_overwrite<TileRun[]>(run_begin[tiles] + runs_ahead);
    tile_columns = std::make_unique_for_overwrite<uint16_t[]>(connections);
    std::fill_n(&runs[run_begin[tiles]], runs_ahead, TileRun{});
    parallel_for(tiles, workers, [&](int64_t tile) { fill_tile(tile, csr); });
    starts.reset();
}

// Calls body(row, first slot, length) for the runs of a tile that have any connection.
template <class Body> void Tiles::each_run(int64_t tile, const Body &body) const {
    const int64_t first_row = tile / tiles_across * tile_rows;
    for (int64_t row = first_row; row < std::min(rows, first_row + tile_rows); ++row) {
        const int32_t *start = &starts[row * (tiles_across + 1) + tile % tiles_across];
        if (start[1] > start[0])
            body(row, start[0], start[1] - start[0]);
    }
}

std::vector<int32_t> Tiles::runs_of_length(int64_t tile) const {
    std::vector<int32_t> count(std::min(tile_width, columns) + 1);
    each_run(tile, [&](int64_t, int32_t, int32_t length) { ++count[length]; });
    return count;
}

// Leaves the tile's sizes one further, where the running sums are taken.
void Tiles::count_tile(int64_t tile) {
    const std::vector<int32_t> count = runs_of_length(tile);
    for (size_t length = 1; length < count.size(); ++length) {
        segment_begin[tile + 1] += count[length] > 0;
        run_begin[tile + 1] += count[length];
        connection_begin[tile + 1] += count[length] * static_cast<int32_t>(length);
    }
}

void Tiles::fill_tile(int64_t tile, const Csr &csr) {
    std::vector<int32_t> next_run = runs_of_length(tile), next_connection(next_run.size());
    int32_t segment = segment_begin[tile], run = run_begin[tile], connection = connection_begin[tile];
    for (size_t length = 1; length < next_run.size(); ++length) {
        const int32_t count = next_run[length];
        if (count > 0)
            segments[segment++] = {static_cast<int32_t>(length), count};
        next_run[length] = run;
        next_connection[length] = connection;
        run += count;
        connection += count * static_cast<int32_t>(length);
    }
    const int32_t first_column = static_cast<int32_t>(tile % tiles_across * tile_width);
    each_run(tile, [&](int64_t row, int32_t slot, int32_t length) {
        runs[next_run[length]++] = {static_cast<int32_t>(row), slot};
        uint16_t *to = &tile_columns[next_connection[length]];
        next_connection[length] += length;
        for (int32_t i = 0; i < length; ++i)
            to[i] = static_cast<uint16_t>(csr.col_indices[slot + i] - first_column);
    });
}

TilePlan Tiles::view() const {
    return {segment_begin.data(),
            run_begin.data(),
            connection_begin.data(),
            segments.get(),
            runs.get(),
            tile_columns.get(),
            rows,
            columns,
            tiles,
            tiles_across,
            tile_width};
}

int64_t Tiles::bytes() const {
    return 3 * (tiles + 1) * static_cast<int64_t>(sizeof(int32_t)) +
           segment_begin[tiles] * static_cast<int64_t>(sizeof(TileSegment)) +
           (run_begin[tiles] + runs_ahead) * static_cast<int64_t>(sizeof(TileRun)) +
           connections * static_cast<int64_t>(sizeof(uint16_t));
}

} // namespace offpath
