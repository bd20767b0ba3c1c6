#include "plan.h"
#include "parallel.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <vector>

namespace offpath {
namespace {

// Groups that a thread plans in one go.
constexpr int64_t groups_per_task = 16;

} // namespace

// What a thread needs to plan a group. Clean again after each group, so that a group costs no more than its own
// connections.
struct Plan::Workspace {
    explicit Workspace(int64_t columns) : masks(columns), next_slot_of(columns), touched(columns) {}
    std::vector<uint8_t> masks;        // [columns], zero between groups
    std::vector<int32_t> next_slot_of; // [columns]: where the next value of this column goes
    std::vector<int32_t> touched;      // the columns of the group
    int64_t touched_count = 0;
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

Plan::Plan(const Csr &csr, int64_t columns, const int32_t *permutation, int64_t columns_per_step, int threads)
    : rows(csr.rows), columns(columns), columns_per_step(columns_per_step), groups(ceil_div(csr.rows, group_rows)),
      connections(csr.crow_indices[csr.rows]) {
    mask_counts = std::make_unique<int32_t[]>(groups * group_masks);
    column_begin = std::make_unique<int32_t[]>(groups + 1);
    slot_begin = std::make_unique<int32_t[]>(groups + 1);
    Pool<Workspace> pool;
    const auto each_group = [&](const auto &body) {
        parallel_for(ceil_div(groups, groups_per_task), connections < serial_work ? 1 : threads, [&](int64_t task) {
            auto workspace = pool.take(columns);
            const int64_t end = std::min(groups, (task + 1) * groups_per_task);
            for (int64_t g = task * groups_per_task; g < end; ++g)
                body(g, *workspace);
            pool.give_back(std::move(workspace));
        });
    };
    each_group([&](int64_t g, Workspace &work) { count_group(g, csr, work); });
    for (int64_t g = 0; g < groups; ++g) {
        column_begin[g + 1] += column_begin[g];
        slot_begin[g + 1] += slot_begin[g];
    }
    column_order = std::make_unique_for_overwrite<int32_t[]>(column_begin[groups] + columns_ahead);
    std::fill_n(&column_order[column_begin[groups]], columns_ahead, 0);
    slots = std::make_unique_for_overwrite<int32_t[]>(slot_begin[groups]);
    each_group([&](int64_t g, Workspace &work) { fill_group(g, csr, permutation, work); });
}

void Plan::find_masks(int64_t group, const Csr &csr, Workspace &work) const {
    uint8_t *masks = work.masks.data();
    int32_t *touched = work.touched.data();
    int64_t count = 0;
    for (int64_t row = 0; row < group_rows && group * group_rows + row < rows; ++row) {
        const int64_t r = group * group_rows + row;
        for (int32_t s = csr.crow_indices[r]; s < csr.crow_indices[r + 1]; ++s) {
            const int32_t column = csr.col_indices[s];
            // Written always and kept only when new: whether a column is new is a coin toss for the predictor.
            if (count < columns)
                touched[count] = column;
            count += masks[column] == 0;
            masks[column] |= 1 << row;
        }
    }
    work.touched_count = count;
}

// Leaves the group's counts in place, and its sizes one further, where the running sums are taken.
void Plan::count_group(int64_t group, const Csr &csr, Workspace &work) {
    find_masks(group, csr, work);
    int32_t *counts = &mask_counts[group * group_masks];
    for (int64_t i = 0; i < work.touched_count; ++i) {
        uint8_t &mask = work.masks[work.touched[i]];
        ++counts[mask];
        mask = 0;
    }
    const int32_t step = static_cast<int32_t>(columns_per_step);
    for (int mask = 1; mask < group_masks; ++mask) {
        counts[mask] = static_cast<int32_t>(ceil_div(counts[mask], step)) * step;
        column_begin[group + 1] += counts[mask];
        slot_begin[group + 1] += counts[mask] * std::popcount(static_cast<unsigned>(mask));
    }
}

void Plan::fill_group(int64_t group, const Csr &csr, const int32_t *permutation, Workspace &work) {
    find_masks(group, csr, work);
    const int32_t *counts = &mask_counts[group * group_masks], step = static_cast<int32_t>(columns_per_step);
    int32_t next_column[group_masks], next_slot[group_masks];
    int32_t column = column_begin[group], slot = slot_begin[group];
    for (int mask = 1; mask < group_masks; ++mask) {
        next_column[mask] = column;
        next_slot[mask] = slot;
        column += counts[mask];
        slot += counts[mask] * std::popcount(static_cast<unsigned>(mask));
    }
    // What no column takes is padding.
    std::fill(&column_order[column_begin[group]], &column_order[column_begin[group + 1]],
              static_cast<int32_t>(columns));
    std::fill(&slots[slot_begin[group]], &slots[slot_begin[group + 1]], -1);
    for (int64_t i = 0; i < work.touched_count; ++i) {
        const int32_t c = work.touched[i];
        const uint8_t mask = work.masks[c];
        // The slots of columns that are multiplied together take turns.
        const int32_t turn = next_column[mask] & (step - 1);
        column_order[next_column[mask]++] = c;
        work.next_slot_of[c] = next_slot[mask] + turn;
        if (turn == step - 1)
            next_slot[mask] += step * std::popcount(mask);
        work.masks[c] = 0;
    }
    for (int64_t r = group * group_rows; r < std::min(rows, (group + 1) * group_rows); ++r)
        for (int32_t s = csr.crow_indices[r]; s < csr.crow_indices[r + 1]; ++s) {
            int32_t &next = work.next_slot_of[csr.col_indices[s]];
            slots[next] = permutation ? permutation[s] : s;
            next += step;
        }
}

void Plan::place_columns(const int32_t *begin) {
    for (int32_t i = 0; i < column_begin[groups]; ++i)
        column_order[i] = begin[column_order[i]];
}

BucketPlan Plan::view() const {
    return {mask_counts.get(), column_order.get(),
            slots.get(),       column_begin.get(),
            slot_begin.get(),  rows,
            columns,           groups};
}

int64_t Plan::bytes() const {
    return static_cast<int64_t>(sizeof(int32_t)) *
           (groups * group_masks + column_begin[groups] + columns_ahead + slot_begin[groups] + 2 * (groups + 1));
}

} // namespace offpath
