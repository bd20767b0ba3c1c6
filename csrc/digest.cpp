#include "digest.h"

#include <cstring>

namespace offpath {
namespace {

constexpr uint64_t multiplier = 0x9E3779B97F4A7C15; // 2^64 / golden ratio, odd

uint64_t mix(uint64_t state, uint64_t word) {
    state = (state ^ word) * multiplier;
    return state ^ (state >> 32); // or the high bits would never reach the low ones
}

} // namespace

uint64_t digest(const int32_t *entries, int64_t count, uint64_t seed) {
    // Eight independent lanes hide the latency of the multiplication.
    constexpr int lanes = 8;
    uint64_t state[lanes];
    for (int lane = 0; lane < lanes; ++lane)
        state[lane] = seed + lane;
    constexpr int64_t entries_per_round = 2 * lanes;
    int64_t i = 0;
    for (; count - i >= entries_per_round; i += entries_per_round) {
        uint64_t words[lanes];
        std::memcpy(words, entries + i, sizeof words);
        for (int lane = 0; lane < lanes; ++lane)
            state[lane] = mix(state[lane], words[lane]);
    }
    uint64_t result = static_cast<uint64_t>(count);
    for (; i < count; ++i)
        result = mix(result, static_cast<uint32_t>(entries[i]));
    for (const uint64_t lane : state)
        result = mix(result, lane);
    return result;
}

} // namespace offpath
