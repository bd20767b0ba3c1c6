// Runs work on torch's own OpenMP pool, and splits a product into blocks of about equal work.
#pragma once

#include "table.h"

#include <string>

namespace offpath {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Looks up the OpenMP runtime that is already loaded (torch's). Throws std::runtime_error when there is none.
void find_pool();

// The file that the pool's runtime was loaded from.
std::string pool_library();

// Calls run(context, i) for every i in [0, count), on at most `threads` threads. The indices are handed out one by
// one: with a fixed share per thread, all would wait for the slowest whenever another process takes a core.
void parallel_for(int64_t count, int threads, void (*run)(const void *context, int64_t i), const void *context);

// The same for anything that can be called with i.
template <class Body> void parallel_for(int64_t count, int threads, const Body &body) {
    const auto call = [](const void *context, int64_t i) { (*static_cast<const Body *>(context))(i); };
    parallel_for(count, threads, call, &body);
}

// Blocks that cover rows x batch exactly once. Rows are split so that blocks hold about the same number of
// connections; the batch is split at multiples of `batch_quantum`, or not at all when that is 0.
class Blocks {
  public:
    Blocks(const Csr &csr, int64_t batch, int64_t batch_quantum, int threads);
    // The same in so many blocks of rows, and strips of `batch_step`.
    static Blocks of(const Csr &csr, int64_t batch, int64_t batch_step, int64_t row_blocks);
    int64_t count() const { return row_blocks * batch_blocks; }
    Block operator[](int64_t i) const;

  private:
    int64_t row_boundary(int64_t i) const;

    const Csr csr;
    const int64_t batch;
    int64_t batch_step, batch_blocks, row_blocks;
};

// Below this many multiply-adds or moved elements, waking the other threads costs more than they save.
constexpr int64_t serial_work = 1 << 16;

} // namespace offpath
