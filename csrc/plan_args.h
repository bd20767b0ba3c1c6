// Patterns in the order in which the products over plans go through them.
#pragma once

#include "basics.h"

namespace offpath {

// Rows that share the loads of x in the bucketed product. Each accumulates in registers of its own.
constexpr int group_rows = 6;
constexpr int group_masks = 1 << group_rows;
// Groups whose rows are finished together: whole squares of lanes.
constexpr int tile_groups = 8;
// How many columns ahead the activations of one are fetched.
constexpr int columns_ahead = 8;

// A pattern prepared for the bucketed product. The rows are taken in groups; in a group, a column's mask says which
// of the rows have a connection to it. The columns of a group stand sorted by mask, the values in the order in which
// the product uses them: column by column, inside a column by row. Where an ISA multiplies in pairs, the slots of two
// columns take turns, and each mask has an even number of columns: the padding is a column of zeros, number `columns`,
// whose slots are -1.
struct BucketPlan {
    const int32_t *mask_counts;  // [groups, group_masks]: how many columns of the group have each mask
    const int32_t *column_order; // the columns of group g start at column_begin[g]; columns_ahead zeros end the list
    const int32_t *slots;        // which of the caller's values stands here; group g starts at slot_begin[g]
    const int32_t *column_begin; // [groups + 1]
    const int32_t *slot_begin;   // [groups + 1]
    int64_t rows, columns, groups;
};

// A pattern prepared for the weight gradient and the product over runs: cut into tiles of rows x columns, in which the
// connections of one row are a run. The runs of a tile stand sorted by length, so that a loop over runs of one length
// needs no branch that the processor could mispredict; the columns of the connections stand in the order of the runs.
struct TileSegment { // runs of one length that follow one another
    int32_t length, runs;
};
struct TileRun {
    int32_t row, slot; // the run's first connection is `slot` of the caller's values
};
// So many runs before its own, the weight gradient fetches a run's row of dy, which lies in the second-level cache or
// beyond.
constexpr int runs_ahead = 8;
struct TilePlan {
    const int32_t *segment_begin;    // [tiles + 1]
    const int32_t *run_begin;        // [tiles + 1]
    const int32_t *connection_begin; // [tiles + 1]
    const TileSegment *segments;
    const TileRun *runs;     // the last is followed by runs_ahead of row 0
    const uint16_t *columns; // [nnz], counted from the first column of the tile
    int64_t rows, matrix_columns, tiles, tiles_across, tile_width;
};

// Rows of a tile in the product over runs: their sums, and the activations of the tile's columns, share the first-level
// cache.
constexpr int run_rows = 48;
// Where a strip of x does not stay in the second-level cache, so many rows of tiles take turns at its tiles.
constexpr int tile_rows_together = 4;

} // namespace offpath
