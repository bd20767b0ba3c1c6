// Runs work on torch's own OpenMP pool, and splits a product into blocks of about equal work.
#pragma once

#include "table.h"

#include <algorithm>
#include <string>

namespace offpath {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Looks up the OpenMP runtime that is already loaded (torch's). Throws std::runtime_error when there is none.
void find_pool();

// The file that the pool's runtime was loaded from.
std::string pool_library();

// The part of the work that a thread begins with, of `of` parts.
struct Share {
    int64_t index, of;

    int64_t begin(int64_t count) const { return count * index / of; }
    int64_t end(int64_t count) const { return count * (index + 1) / of; }
    int64_t size(int64_t count) const { return end(count) - begin(count); }
};

// Tasks by the shares that they belong to.
struct SharedWork {
    const void *context;
    int64_t (*count)(const void *context, const Share &share);
    void (*run)(const void *context, const Share &share, int64_t task);
};

// Runs the tasks of all shares, `tasks` together, on at most `threads` threads. A thread begins with the share that it
// had in the last call: what it wrote then, and no other core has read, it writes again at once, where memory that a
// core with another last-level cache has read takes several times as long. It takes tasks one by one, and then helps
// with what others have left: else all would wait for the slowest whenever another process takes a core.
void run_shares(const SharedWork &work, int64_t tasks, int threads);

// Calls body(i) for every i in [0, count), on at most `threads` threads; a share is a range.
template <class Body> void parallel_for(int64_t count, int threads, const Body &body) {
    struct Range {
        const Body &body;
        int64_t count;
    };
    const Range range{body, count};
    run_shares(
        {&range,
         [](const void *context, const Share &share) { return share.size(static_cast<const Range *>(context)->count); },
         [](const void *context, const Share &share, int64_t task) {
             const Range &own = *static_cast<const Range *>(context);
             own.body(share.begin(own.count) + task);
         }},
        count, threads);
}

// Several blocks a thread, so that one late thread delays the end by a fraction of its share.
constexpr int64_t blocks_per_thread = 8;

constexpr int64_t rows_per_block = 64;

// Calls run(block) for all rows, rows_per_block of them in a block.
template <class Run> void by_rows(int64_t rows, int threads, const Run &run) {
    parallel_for(ceil_div(rows, rows_per_block), threads,
                 [&](int64_t i) { run(Block{i * rows_per_block, std::min(rows, (i + 1) * rows_per_block), 0, 0}); });
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
