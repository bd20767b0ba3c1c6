// The tile registers of AMX, which hold 16 rows of 64 bytes each: four of sums, two of either factor. To the compiler
// they are no registers, and the intrinsics do not tell it all that they read: an empty statement says that memory has
// to be as it is written, before.
#pragma once

#include "amx_args.h"

#include <immintrin.h>

namespace {

// The numbers of tile registers have to stand in the source.
#define OFFPATH_MULTIPLY_TILES(sums, left, right)                                                                      \
    do {                                                                                                               \
        if constexpr (sizeof(Entry) == 1)                                                                              \
            _tile_dpbssd(sums, left, right);                                                                           \
        else                                                                                                           \
            _tile_dpbf16ps(sums, left, right);                                                                         \
    } while (false)

// While it lives, the tile registers have their shape. Afterwards they are as good as unused, so that the system need
// not save them with the thread's others.
struct TileRegisters {
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes_per_row[16];
            uint8_t rows[16];
        } shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; ++i) {
            shape.bytes_per_row[i] = 64;
            shape.rows[i] = offpath::strip_lines;
        }
        __asm__ volatile("" ::"r"(&shape) : "memory");
        _tile_loadconfig(&shape);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters &) = delete;
    TileRegisters &operator=(const TileRegisters &) = delete;

    // sums (+)= left x right for `lefts` strips times `rights`, which lie `left_stride` and `right_stride` apart.
    template <int lefts, int rights, class Entry, class Sum>
    static void multiply(const Entry *left, int64_t left_stride, const Entry *right, int64_t right_stride,
                         int64_t tiles, bool from_zero, Sum *sums) {
        constexpr int64_t bytes_per_line = offpath::pair_lines * sizeof(Sum);
        constexpr int64_t tile_entries = offpath::entries_of_tile<Entry>;
        Sum *const second_line = sums + offpath::strip_lines * offpath::pair_lines;
        __asm__ volatile("" ::: "memory");
        if (from_zero) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, bytes_per_line);
            if constexpr (rights == 2)
                _tile_loadd(1, sums + offpath::strip_lines, bytes_per_line);
            if constexpr (lefts == 2)
                _tile_loadd(2, second_line, bytes_per_line);
            if constexpr (lefts == 2 && rights == 2)
                _tile_loadd(3, second_line + offpath::strip_lines, bytes_per_line);
        }
        for (const Entry *end = left + tiles * tile_entries; left < end; left += tile_entries, right += tile_entries) {
            _tile_loadd(6, right, 64);
            if constexpr (rights == 2)
                _tile_loadd(7, right + right_stride, 64);
            _tile_loadd(4, left, 64);
            OFFPATH_MULTIPLY_TILES(0, 4, 6);
            if constexpr (rights == 2)
                OFFPATH_MULTIPLY_TILES(1, 4, 7);
            if constexpr (lefts == 2) {
                _tile_loadd(5, left + left_stride, 64);
                OFFPATH_MULTIPLY_TILES(2, 5, 6);
            }
            if constexpr (lefts == 2 && rights == 2)
                OFFPATH_MULTIPLY_TILES(3, 5, 7);
        }
        _tile_stored(0, sums, bytes_per_line);
        if constexpr (rights == 2)
            _tile_stored(1, sums + offpath::strip_lines, bytes_per_line);
        if constexpr (lefts == 2)
            _tile_stored(2, second_line, bytes_per_line);
        if constexpr (lefts == 2 && rights == 2)
            _tile_stored(3, second_line + offpath::strip_lines, bytes_per_line);
        __asm__ volatile("" ::: "memory");
    }
};

#undef OFFPATH_MULTIPLY_TILES

} // namespace
