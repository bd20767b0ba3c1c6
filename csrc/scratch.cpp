#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace offpath {
namespace {

// Enough for what a step of a mid-sized model takes and gives back; what exceeds it goes back to the system.
constexpr size_t kept_limit_bytes = size_t{256} << 20;
constexpr size_t alignment = 64;

// Stands before each block that is handed out.
struct alignas(alignment) Header {
    size_t bytes;
};

std::mutex lock;
std::vector<Header *> kept;
size_t kept_bytes = 0;

} // namespace

void *take_scratch(size_t bytes) {
    bytes = (bytes + alignment - 1) / alignment * alignment;
    {
        const std::lock_guard guard(lock);
        // The smallest that fits, but none that would be wasted on this request; of several, the one that was given
        // back last, most likely by the same thread: it is in its caches, and not in another's.
        auto best = kept.end();
        for (auto block = kept.begin(); block != kept.end(); ++block)
            if ((*block)->bytes >= bytes && (*block)->bytes <= 2 * bytes &&
                (best == kept.end() || (*block)->bytes <= (*best)->bytes))
                best = block;
        if (best != kept.end()) {
            Header *found = *best;
            kept.erase(best);
            kept_bytes -= found->bytes;
            return found + 1;
        }
    }
    void *memory = std::aligned_alloc(alignment, sizeof(Header) + bytes);
    if (!memory)
        throw std::bad_alloc();
    return new (memory) Header{bytes} + 1;
}

void give_back_scratch(void *block) noexcept {
    Header *header = static_cast<Header *>(block) - 1;
    const std::lock_guard guard(lock);
    try {
        kept.push_back(header);
    } catch (const std::bad_alloc &) {
        std::free(header);
        return;
    }
    kept_bytes += header->bytes;
    // The oldest go first: their size has been wanted by nobody for longest.
    while (kept_bytes > kept_limit_bytes) {
        kept_bytes -= kept.front()->bytes;
        std::free(kept.front());
        kept.erase(kept.begin());
    }
}

size_t kept_scratch_bytes() {
    const std::lock_guard guard(lock);
    return kept_bytes;
}

} // namespace offpath
