#include "plan.h"
#include "parallel.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <vector>

namespace offpath {
namespace {

// Groups that a thread plans or gathers in one go.
constexpr int64_t groups_per_task = 16;

int64_t tasks_for(int64_t groups) { return (groups + groups_per_task - 1) / groups_per_task; }

} // namespace

// What a thread needs to plan a group: the mask of every column and where its connections are. Clean again after
// each group, so that a group costs no more than its own connections.
struct Plan::Workspace {
    explicit Workspace(int64_t columns) : masks(columns), slots(columns * group_rows) {}
    std::vector<uint8_t> masks;   // [columns], zero between groups
    std::vector<int32_t> slots;   // [columns, group_rows]
    std::vector<int32_t> touched; // the columns of the group
    int32_t next_column[group_masks], next_slot[group_masks];
};

namespace {

// One workspace per thread that is planning right now, made on demand and handed from task to task.
template <class Workspace> class Pool {
  public:
    std::unique_ptr<Workspace> take(int64_t columns) {
        const std::lock_guard guard(lock);
        if (free.empty())
            return std::make_unique<Workspace>(columns);
        auto workspace = std::move(free.back());
        free.pop_back();
        return workspace;
    }
    void give_back(std::unique_ptr<Workspace> workspace) {
        const std::lock_guard guard(lock);
        free.push_back(std::move(workspace));
    }

  private:
    std::mutex lock;
    std::vector<std::unique_ptr<Workspace>> free;
};

} // namespace

Plan::Plan(const Csr &csr, int64_t columns, const int32_t *permutation, int threads)
    : rows(csr.rows), columns(columns), groups((csr.rows + group_rows - 1) / group_rows) {
    const int64_t nnz = csr.crow_indices[csr.rows];
    mask_counts = std::make_unique<int32_t[]>(groups * group_masks);
    column_order = std::make_unique_for_overwrite<int32_t[]>(nnz);
    slots = std::make_unique_for_overwrite<int32_t[]>(nnz);
    group_begin = std::make_unique_for_overwrite<int32_t[]>(groups + 1);
    for (int64_t g = 0; g <= groups; ++g)
        group_begin[g] = csr.crow_indices[std::min(rows, g * group_rows)];
    Pool<Workspace> pool;
    parallel_for(tasks_for(groups), nnz < serial_work ? 1 : threads, [&](int64_t task) {
        auto workspace = pool.take(columns);
        const int64_t end = std::min(groups, (task + 1) * groups_per_task);
        for (int64_t g = task * groups_per_task; g < end; ++g)
            plan_group(g, csr, permutation, *workspace);
        pool.give_back(std::move(workspace));
    });
}

void Plan::plan_group(int64_t group, const Csr &csr, const int32_t *permutation, Workspace &work) {
    work.touched.clear();
    for (int64_t row = 0; row < group_rows && group * group_rows + row < rows; ++row) {
        const int64_t r = group * group_rows + row;
        for (int32_t s = csr.crow_indices[r]; s < csr.crow_indices[r + 1]; ++s) {
            const int32_t column = csr.col_indices[s];
            if (work.masks[column] == 0)
                work.touched.push_back(column);
            work.masks[column] |= 1 << row;
            work.slots[static_cast<int64_t>(column) * group_rows + row] = permutation ? permutation[s] : s;
        }
    }
    int32_t *counts = &mask_counts[group * group_masks];
    for (const int32_t column : work.touched)
        ++counts[work.masks[column]];
    int32_t next_column = group_begin[group], next_slot = group_begin[group];
    for (int mask = 1; mask < group_masks; ++mask) {
        work.next_column[mask] = next_column;
        work.next_slot[mask] = next_slot;
        next_column += counts[mask];
        next_slot += counts[mask] * std::popcount(static_cast<unsigned>(mask));
    }
    for (const int32_t column : work.touched) {
        const int mask = work.masks[column];
        column_order[work.next_column[mask]++] = column;
        for (int row = 0; row < group_rows; ++row)
            if (mask >> row & 1)
                slots[work.next_slot[mask]++] = work.slots[static_cast<int64_t>(column) * group_rows + row];
        work.masks[column] = 0;
    }
}

BucketPlan Plan::view() const {
    return {mask_counts.get(), column_order.get(), slots.get(), group_begin.get(), rows, columns, groups};
}

int64_t Plan::bytes() const {
    return static_cast<int64_t>(sizeof(int32_t)) * (groups * group_masks + 2 * nnz() + groups + 1);
}

int64_t Plan::gather_tasks() const { return tasks_for(groups); }

template <class T> void Plan::gather(const T *values, T *ordered, int64_t task) const {
    const int64_t end = std::min(groups, (task + 1) * groups_per_task);
    for (int64_t i = group_begin[task * groups_per_task]; i < group_begin[end]; ++i)
        ordered[i] = values[slots[i]];
}

template void Plan::gather(const float *, float *, int64_t) const;
template void Plan::gather(const double *, double *, int64_t) const;

} // namespace offpath
