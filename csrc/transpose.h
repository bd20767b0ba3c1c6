// Copies a matrix into its transpose, on the pool.
#pragma once

#include "parallel.h"

#include <algorithm>

namespace offpath {

// destination[c * destination_stride + r] = source[r * source_stride + c] for a rows x columns source.
template <class T>
void transpose(const T *source, int64_t source_stride, T *destination, int64_t destination_stride, int64_t rows,
               int64_t columns, int threads) {
    // A square tile of whole cache lines on both sides: every line is read and written while it is at hand.
    constexpr int64_t tile = 64 / sizeof(T);
    // A panel of source rows is the unit of work for a thread.
    struct Panels {
        const T *source;
        int64_t source_stride;
        T *destination;
        int64_t destination_stride, rows, columns;
    } panels{source, source_stride, destination, destination_stride, rows, columns};
    const auto move_panel = [](const void *data, int64_t panel) {
        const Panels &p = *static_cast<const Panels *>(data);
        const int64_t row_begin = panel * tile, row_end = std::min(p.rows, row_begin + tile);
        for (int64_t column = 0; column < p.columns; column += tile) {
            const int64_t column_end = std::min(p.columns, column + tile);
            for (int64_t c = column; c < column_end; ++c)
                for (int64_t r = row_begin; r < row_end; ++r)
                    p.destination[c * p.destination_stride + r] = p.source[r * p.source_stride + c];
        }
    };
    const int64_t panel_count = (rows + tile - 1) / tile;
    parallel_for(panel_count, rows * columns < serial_work ? 1 : threads, move_panel, &panels);
}

} // namespace offpath
