// The tile registers of AMX, entry by entry, for machines that lack them: included before all else where their kernels
// are compiled for another CPU. Each does what Intel's manual (Software Developer's Manual, volume 2) says of it for
// tiles of 16 rows of 64 bytes, but that subnormal numbers are kept; anything else that a tile could be is refused.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace {
namespace emulated {

struct Tile {
    alignas(64) uint8_t row[16][64];
};
struct Tiles {
    bool configured;
    Tile tile[8];
};
inline thread_local Tiles tiles;

inline void expect(bool as_it_should_be) {
    if (!as_it_should_be)
        __builtin_trap();
}
inline Tile &tile(int number) {
    expect(tiles.configured);
    return tiles.tile[number];
}

inline void configure(const void *shape) {
    const auto *bytes = static_cast<const uint8_t *>(shape);
    for (int i = 0; i < 8; ++i)
        expect(bytes[0] == 1 && bytes[1] == 0 && bytes[16 + 2 * i] == 64 && bytes[17 + 2 * i] == 0 &&
               bytes[48 + i] == 16);
    tiles = {};
    tiles.configured = true;
}
inline void zero(int number) { tile(number) = {}; }
inline void load(int number, const void *from, long stride) {
    for (int i = 0; i < 16; ++i)
        __builtin_memcpy(tile(number).row[i], static_cast<const uint8_t *>(from) + i * stride, 64);
}
inline void store(int number, void *to, long stride) {
    for (int i = 0; i < 16; ++i)
        __builtin_memcpy(static_cast<uint8_t *>(to) + i * stride, tile(number).row[i], 64);
}

inline float as_float(const uint8_t *bfloat16) {
    uint16_t bits;
    __builtin_memcpy(&bits, bfloat16, sizeof bits);
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
inline void multiply(int sums, int left, int right) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum;
            uint8_t *of_sum = tile(sums).row[m] + 4 * n;
            __builtin_memcpy(&sum, of_sum, sizeof sum);
            for (int i = 0; i < 32; ++i) // pair by pair
                sum += as_float(tile(left).row[m] + 2 * i) * as_float(tile(right).row[i / 2] + 4 * n + i % 2 * 2);
            __builtin_memcpy(of_sum, &sum, sizeof sum);
        }
}
inline void multiply_bytes(int sums, int left, int right) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            uint32_t sum; // which wraps around, as the processor's does
            uint8_t *of_sum = tile(sums).row[m] + 4 * n;
            __builtin_memcpy(&sum, of_sum, sizeof sum);
            for (int i = 0; i < 64; ++i) // four by four
                sum += static_cast<uint32_t>(static_cast<int8_t>(tile(left).row[m][i]) *
                                             static_cast<int8_t>(tile(right).row[i / 4][4 * n + i % 4]));
            __builtin_memcpy(of_sum, &sum, sizeof sum);
        }
}

} // namespace emulated
} // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(shape) emulated::configure(shape)
#define _tile_release() (emulated::tiles.configured = false)
#define _tile_zero(number) emulated::zero(number)
#define _tile_loadd(number, from, stride) emulated::load(number, from, stride)
#define _tile_stored(number, to, stride) emulated::store(number, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
#define _tile_dpbssd(sums, left, right) emulated::multiply_bytes(sums, left, right)
