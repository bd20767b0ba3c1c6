#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <dlfcn.h>
#include <stdexcept>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#include <string_view>
#endif

namespace offpath {
namespace {

// Torch's library of operators, where it is loaded.
void *torch_library() {
#if defined(__APPLE__)
    for (uint32_t i = 0; i < _dyld_image_count(); ++i)
        if (const std::string_view path = _dyld_get_image_name(i); path.ends_with("/libtorch_cpu.dylib"))
            return dlopen(path.data(), RTLD_LAZY | RTLD_NOLOAD);
    return nullptr;
#else
    return dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
}

// The entry point that `#pragma omp parallel` compiles to. It is looked up instead of linked: a wheel of torch may
// carry its runtime under another file name, and linking would then load a second runtime whose threads spin
// beside torch's.
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

GompParallel gomp_parallel = nullptr;
int (*thread_number)() = nullptr;

// More threads than this begin with the same shares.
constexpr int64_t most_shares = 64;

struct Loop {
    struct alignas(64) Cursor { // on a cache line of its own
        std::atomic<int64_t> next{0};
    };
    const SharedWork &work;
    int64_t shares;
    Cursor cursors[most_shares];

    static void run(void *data) {
        Loop &loop = *static_cast<Loop *>(data);
        const int64_t own = thread_number();
        for (int64_t i = 0; i < loop.shares; ++i) {
            const Share share{(own + i) % loop.shares, loop.shares};
            const int64_t count = loop.work.count(loop.work.context, share);
            std::atomic<int64_t> &next = loop.cursors[share.index].next;
            for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                loop.work.run(loop.work.context, share, task);
        }
    }
};

} // namespace

void find_pool() {
    // Where torch's operators find it: among what is visible everywhere, or among what they are linked with. Torch
    // makes its OpenMP runtime visible everywhere on x86-64, and not on AArch64.
    void *const where = dlsym(RTLD_DEFAULT, "GOMP_parallel") ? RTLD_DEFAULT : torch_library();
    gomp_parallel = reinterpret_cast<GompParallel>(dlsym(where, "GOMP_parallel"));
    thread_number = reinterpret_cast<int (*)()>(dlsym(where, "omp_get_thread_num"));
    if (!gomp_parallel || !thread_number)
        throw std::runtime_error("no OpenMP runtime is loaded in this process; import torch before offpath's module");
}

std::string pool_library() {
    Dl_info info;
    return dladdr(reinterpret_cast<void *>(gomp_parallel), &info) && info.dli_fname ? info.dli_fname : "";
}

void run_shares(const SharedWork &work, int64_t tasks, int threads) {
    const int64_t workers = std::min<int64_t>(threads, tasks);
    if (workers <= 1) {
        for (int64_t task = 0; task < tasks; ++task)
            work.run(work.context, {0, 1}, task);
        return;
    }
    Loop loop{work, std::min(workers, most_shares)};
    gomp_parallel(&Loop::run, &loop, static_cast<unsigned>(workers), 0);
}

Blocks::Blocks(const Csr &csr, int64_t batch, int64_t batch_quantum, int threads)
    : csr(csr), batch(batch), batch_step(batch), batch_blocks(1), row_blocks(1) {
    const int64_t nnz = csr.crow_indices[csr.rows];
    if (threads <= 1 || csr.rows == 0 || (nnz + csr.rows) * batch < serial_work)
        return;
    const int64_t wanted = threads * blocks_per_thread;
    if (batch_quantum > 0 && batch > batch_quantum) {
        batch_step = batch_quantum;
        batch_blocks = ceil_div(batch, batch_quantum);
    }
    row_blocks = std::min(csr.rows, std::max<int64_t>(threads, wanted / batch_blocks));
}

Blocks Blocks::of(const Csr &csr, int64_t batch, int64_t batch_step, int64_t row_blocks) {
    Blocks blocks(csr, batch, 0, 1);
    blocks.batch_step = batch_step;
    blocks.batch_blocks = ceil_div(batch, batch_step);
    blocks.row_blocks = std::clamp<int64_t>(row_blocks, 1, std::max<int64_t>(csr.rows, 1));
    return blocks;
}

// First row of row block i: connections (plus one per row, so that empty rows count) are split evenly.
int64_t Blocks::row_boundary(int64_t i) const {
    if (i == row_blocks)
        return csr.rows;
    const int64_t work = csr.crow_indices[csr.rows] + csr.rows;
    const int64_t target = work / row_blocks * i + work % row_blocks * i / row_blocks;
    int64_t low = 0, high = csr.rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (csr.crow_indices[middle] + middle < target)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

Block Blocks::operator[](int64_t i) const {
    // Neighbouring blocks share a strip of the batch, which then stays in cache.
    const int64_t rows = i % row_blocks, strip = i / row_blocks;
    return {row_boundary(rows), row_boundary(rows + 1), strip * batch_step, std::min(batch, (strip + 1) * batch_step)};
}

} // namespace offpath
