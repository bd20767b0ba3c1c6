// Memory in which a single entry too far is seen, whatever instruction touched it.
//
// AddressSanitizer checks the loads and stores that the compiler emits, but not the masked vector instructions, which
// are opaque to it. So a block ends at a page that may not be touched at all, and the rest of its pages is poisoned.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#endif

// `bytes` bytes between two pages without access. Every bit is 1, which is a NaN in every dtype: what a kernel reads
// before it was written shows in its result.
class Guarded {
  public:
    explicit Guarded(size_t bytes) {
        const size_t page = page_bytes();
        const size_t usable = (bytes + page - 1) / page * page;
        mapped_bytes = usable + 2 * page;
        void *memory = mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            throw std::bad_alloc();
        mapped = static_cast<char *>(memory);
        if (usable && mprotect(mapped + page, usable, PROT_READ | PROT_WRITE) != 0)
            throw std::bad_alloc();
        block = mapped + page + usable - bytes;
        ASAN_POISON_MEMORY_REGION(mapped, mapped_bytes);
        ASAN_UNPOISON_MEMORY_REGION(block, bytes);
        std::memset(block, 0xFF, bytes);
    }
    Guarded(Guarded &&other) noexcept
        : mapped_bytes(other.mapped_bytes), mapped(std::exchange(other.mapped, nullptr)), block(other.block) {}
    ~Guarded() {
        if (!mapped)
            return;
        ASAN_UNPOISON_MEMORY_REGION(mapped, mapped_bytes);
        munmap(mapped, mapped_bytes);
    }

    void *data() const { return block; }
    // From now on, who writes to the block dies.
    void make_read_only() const {
        const size_t page = page_bytes();
        mprotect(mapped + page, mapped_bytes - 2 * page, PROT_READ);
    }

  private:
    static size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

    size_t mapped_bytes;
    char *mapped, *block;
};

template <class T> class GuardedArray {
  public:
    explicit GuardedArray(size_t count) : count(count), memory(count * sizeof(T)) {}

    template <class Source> static GuardedArray read_only(const Source &source) {
        GuardedArray block(source.size());
        std::copy(source.begin(), source.end(), block.data());
        block.make_read_only();
        return block;
    }
    void make_read_only() const { memory.make_read_only(); }

    T *data() const { return static_cast<T *>(memory.data()); }
    size_t size() const { return count; }
    T &operator[](size_t i) const { return data()[i]; }

  private:
    size_t count;
    Guarded memory;
};
