// Working memory that products take and give back. Fresh pages cost more than a small product itself (the system
// clears each at its first touch), so blocks are kept between calls.
#pragma once

#include <cstddef>
#include <memory>

namespace offpath {

void *take_scratch(size_t bytes);
void give_back_scratch(void *block) noexcept;

// Bytes that are kept for later calls.
size_t kept_scratch_bytes();

struct GiveBackScratch {
    void operator()(void *block) const noexcept { give_back_scratch(block); }
};

// `count` entries of T, not initialised, 64-byte aligned. Throws std::bad_alloc.
template <class T> using Scratch = std::unique_ptr<T[], GiveBackScratch>;
template <class T> Scratch<T> scratch(size_t count) {
    return Scratch<T>(static_cast<T *>(take_scratch(count * sizeof(T))));
}

} // namespace offpath
