// A fingerprint of index arrays, to notice that somebody wrote into them.
#pragma once

#include <cstdint>

namespace offpath {

// Every step of a lane is a bijection of its state, so a change of a single entry always changes the result.
uint64_t digest(const int32_t *entries, int64_t count, uint64_t seed);

} // namespace offpath
