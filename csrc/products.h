// The products as they are called: activations in any layout in, threads and scratch memory taken care of.
#pragma once

#include "parallel.h"
#include "product_plan.h"
#include "scratch.h"
#include "table.h"

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace offpath {

template <class Args> using Kernel = void (*)(const Args &, const Block &);

template <class T> const Kernels<T> &kernels_of(const KernelTable &table) {
    if constexpr (std::is_same_v<T, float>)
        return table.f32;
    else if constexpr (std::is_same_v<T, double>)
        return table.f64;
    else
        return table.bf16;
}

// A [features, batch] matrix as torch hands it over: any strides, one of which is 1.
template <class T> struct Matrix {
    const T *data;
    int64_t feature_stride, batch_stride;
};

template <class T> Matrix<T> exchanged(const Matrix<T> &matrix) {
    return {matrix.data, matrix.batch_stride, matrix.feature_stride};
}

// Columns that a thread transposes or packs in one go, and groups whose rows it computes: whole tiles of the kernels.
constexpr int64_t columns_per_transpose = 64, columns_per_pack = 256, groups_per_product = 16;
// Of the second-level cache, what a strip of activations may fill.
constexpr int64_t cached_strip_bytes = 256 << 10;

inline int threads_for(int64_t work, int threads) { return work < serial_work ? 1 : threads; }

// The feature-major form of a matrix in the type of the sums, `width` >= batch entries a feature: itself, or a copy,
// whose entries beyond the batch are zero. The features of a single token stand side by side.
template <class T> class FeatureMajor {
  public:
    FeatureMajor(const Kernels<T> &kernels, const Matrix<T> &matrix, int64_t features, int64_t batch, int64_t width,
                 int threads) {
        if constexpr (std::is_same_v<T, Sum<T>>)
            if (width == batch && (batch == 1 ? matrix.feature_stride : matrix.batch_stride) == 1) {
                data = matrix.data;
                stride = matrix.feature_stride;
                return;
            }
        copy = scratch<Sum<T>>(features * width);
        const to_features_args<T> args{matrix.data, matrix.batch_stride, matrix.feature_stride, copy.get(), width};
        parallel_for(ceil_div(features, columns_per_transpose), threads_for(features * batch, threads), [&](int64_t i) {
            const int64_t begin = i * columns_per_transpose;
            kernels.to_features(args, {0, batch, begin, std::min(features, begin + columns_per_transpose)});
        });
        data = copy.get();
        stride = width;
    }
    const Sum<T> *data;
    int64_t stride;

  private:
    Scratch<Sum<T>> copy;
};

// y[b, r] = bias[r] + sum over row r's slots s of values[s] * x[col_indices[s], b]; y is [batch, rows], contiguous.
template <class T>
void spmm(const Kernels<T> &kernels, const Csr &csr, int64_t columns, const T *values, const T *bias,
          const Matrix<T> &x, int64_t batch, T *y, int threads) {
    // Whole registers of the widest kind, so that none has to be loaded in part.
    constexpr int64_t lanes = 64 / sizeof(Sum<T>);
    const int64_t width = batch == 1 ? 1 : ceil_div(batch, lanes) * lanes;
    const FeatureMajor<T> features(kernels, x, columns, batch, width, threads);
    const spmm_args<T> args{csr, values, bias, features.data, features.stride, y, batch};
    // A strip that keeps eight of the widest registers busy; splitting the batch there leaves no tails inside.
    constexpr int64_t batch_quantum = 8 * lanes;
    const Blocks blocks(csr, batch, batch_quantum, threads);
    parallel_for(blocks.count(), threads, [&](int64_t i) { kernels.spmm(args, blocks[i]); });
}

// Activations in panels, packed by tasks that any loop may run. What lies behind the last column of the last panel may
// be read, but means nothing: a group of rows goes beyond it.
template <class T> class Panels {
  public:
    Panels(const Kernels<T> &kernels, const Matrix<T> &x, int64_t columns, int64_t batch)
        : count(ceil_div(batch, kernels.layout.panel_width)),
          memory(scratch<char>((count * (columns + 1) + group_rows) * kernels.layout.panel_width *
                               kernels.layout.panel_entry_bytes)),
          kernel(kernels.pack), args{x.data, x.feature_stride, x.batch_stride, memory.get(), columns, batch},
          packs(ceil_div(columns, columns_per_pack)) {}

    int64_t tasks() const { return packs * count; }
    void run(int64_t task) const {
        const int64_t begin = task % packs * columns_per_pack, panel = task / packs;
        kernel(args, {begin, std::min(args.columns, begin + columns_per_pack), panel, panel + 1});
    }
    const void *data() const { return memory.get(); }

    const int64_t count;

  private:
    const Scratch<char> memory;
    const Kernel<pack_args<T>> kernel;
    const pack_args<T> args;
    const int64_t packs;
};

// The caller's values in the order of a plan, or they themselves where that is theirs. They are gathered in every call:
// a copy kept from the last one could be stale, since torch does not count writes that go through `.data`.
template <class T> class OrderedValues {
  public:
    template <class AnyPlan>
    OrderedValues(const Kernels<T> &kernels, const AnyPlan &plan, const T *values)
        : kernel(kernels.gather), args{plan.order(), values, nullptr} {
        if constexpr (std::is_same_v<T, Sum<T>>)
            if (!args.plan.slots)
                return;
        memory = scratch<char>(plan.slot_count() * kernels.layout.value_bytes);
        args.ordered = memory.get();
    }

    int64_t tasks() const { return args.ordered ? ceil_div(args.plan.groups, groups_per_product) : 0; }
    void run(int64_t task) const {
        const int64_t begin = task * groups_per_product;
        kernel(args, {begin, std::min(args.plan.groups, begin + groups_per_product), 0, 0});
    }
    const void *data() const { return args.ordered ? args.ordered : args.values; }

  private:
    Scratch<char> memory;
    const Kernel<gather_args<T>> kernel;
    gather_args<T> args;
};

// The product over runs. Neighbouring tasks share a strip of panels.
template <class T> class RunProduct {
  public:
    RunProduct(const Kernels<T> &kernels, const runs_args<T> &args, int64_t panels)
        : kernel(kernels.runs), args(args), tile_rows(ceil_div(args.plan.rows, run_rows)),
          strips(ceil_div(panels, kernels.layout.run_panels)) {
        const int64_t strip_bytes =
            args.plan.matrix_columns * kernels.layout.run_panels * kernels.layout.panel_width * sizeof(Sum<T>);
        together = strip_bytes > cached_strip_bytes ? tile_rows_together : 1;
        chunks = ceil_div(tile_rows, together);
    }

    int64_t tasks() const { return chunks * strips; }
    void run(int64_t task) const {
        const int64_t begin = task % chunks * together, strip = task / chunks;
        kernel(args, {begin, std::min(tile_rows, begin + together), strip, strip + 1});
    }

  private:
    const Kernel<runs_args<T>> kernel;
    const runs_args<T> args;
    const int64_t tile_rows, strips;
    int64_t together, chunks;
};

// The bucketed product over what was packed and ordered. Neighbouring tasks share a panel, which then stays in cache.
template <class T> class BucketedProduct {
  public:
    BucketedProduct(const Kernels<T> &kernels, const bucketed_args<T> &args, int64_t panels)
        : kernel(kernels.bucketed), args(args), chunks(ceil_div(args.plan.groups, groups_per_product)), panels(panels),
          more_packed(panels * kernels.layout.panel_width * args.plan.columns >
                      args.plan.slot_begin[args.plan.groups]) {}

    int64_t tasks() const { return chunks * panels; }
    // A share is of the rows, whose values its thread has ordered, or of the panels that it has packed: of what is
    // more.
    int64_t tasks(const Share &share) const {
        return by_panels(share) ? share.size(panels) * chunks : share.size(chunks) * panels;
    }
    void run(const Share &share, int64_t task) const {
        const bool whole_rows = by_panels(share);
        const int64_t own = whole_rows ? chunks : share.size(chunks);
        const int64_t panel = (whole_rows ? share.begin(panels) : 0) + task / own;
        const int64_t begin = ((whole_rows ? 0 : share.begin(chunks)) + task % own) * groups_per_product;
        kernel(args, {begin, std::min(args.plan.groups, begin + groups_per_product), panel, panel + 1});
    }

  private:
    bool by_panels(const Share &share) const { return more_packed && panels >= share.of; }

    const Kernel<bucketed_args<T>> kernel;
    const bucketed_args<T> args;
    const int64_t chunks, panels;
    const bool more_packed;
};

// Calls body with the product over a plan, of what was packed and ordered.
template <class T, class Body>
void with_planned_product(const Kernels<T> &kernels, const ProductPlan &plan, const OrderedValues<T> &values,
                          const T *bias, const Panels<T> &panels, int64_t batch, T *y, bool feature_major,
                          const Body &body) {
    if (plan.runs)
        body(RunProduct<T>(kernels,
                           {plan.runs->view(), static_cast<const Sum<T> *>(values.data()), nullptr, bias, panels.data(),
                            y, batch, feature_major},
                           panels.count));
    else
        body(BucketedProduct<T>(kernels,
                                {plan.buckets->view(), values.data(), bias, panels.data(), y, batch, feature_major},
                                panels.count));
}

// How many tasks of a part belong to a share, and such a task: neighbours, unless the part says otherwise.
template <class Part> int64_t tasks_of(const Part &part, const Share &share) {
    if constexpr (requires { part.tasks(share); })
        return part.tasks(share);
    else
        return share.size(part.tasks());
}

template <class Part> void run_task(const Part &part, const Share &share, int64_t task) {
    if constexpr (requires { part.run(share, task); })
        part.run(share, task);
    else
        part.run(share.begin(part.tasks()) + task);
}

// Runs the tasks of all parts in one round of the threads, each share in the order in which the parts are given.
template <class... Parts> void run_together(int threads, const Parts &...parts) {
    const std::tuple<const Parts &...> all(parts...);
    using All = decltype(all);
    const auto count = [](const void *context, const Share &share) {
        return std::apply([&](const auto &...part) { return (tasks_of(part, share) + ...); },
                          *static_cast<All *>(context));
    };
    const auto run = [](const void *context, const Share &share, int64_t i) {
        const auto run_if_here = [&](const auto &part) {
            const int64_t tasks = tasks_of(part, share);
            if (i >= 0 && i < tasks)
                run_task(part, share, i);
            i -= tasks;
        };
        std::apply([&](const auto &...part) { (run_if_here(part), ...); }, *static_cast<All *>(context));
    };
    run_shares({&all, count, run}, (parts.tasks() + ...), threads);
}

// The product of spmm over a plan; y is [rows, batch] where feature_major.
template <class T>
void planned_spmm(const Kernels<T> &kernels, const ProductPlan &plan, const T *values, const T *bias,
                  const Matrix<T> &x, int64_t batch, T *y, bool feature_major, int threads) {
    const Panels<T> panels(kernels, x, plan.columns, batch);
    const OrderedValues<T> ordered(kernels, plan, values);
    run_together(threads_for(plan.columns * batch + plan.nnz, threads), panels, ordered);
    const int workers = threads_for((plan.nnz + plan.rows) * batch, threads);
    with_planned_product(kernels, plan, ordered, bias, panels, batch, y, feature_major,
                         [&](const auto &product) { run_together(workers, product); });
}

} // namespace offpath
