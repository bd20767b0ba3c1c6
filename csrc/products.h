// The products as they are called: activations in any layout in, threads and scratch memory taken care of.
#pragma once

#include "parallel.h"
#include "plan.h"
#include "scratch.h"
#include "table.h"

#include <algorithm>

namespace offpath {

template <class Args> using Kernel = void (*)(const Args &, const Block &);

// The kernels of one ISA for one dtype.
template <class T> struct Kernels {
    Kernel<spmm_args<T>> spmm;
    Kernel<sddmm_args<T>> sddmm;
    Kernel<transpose_args<T>> transpose;
    Kernel<pack_args<T>> pack;
    Kernel<bucketed_args<T>> bucketed;
    int64_t panel_width;
};

// A [features, batch] matrix as torch hands it over: any strides, one of which is 1.
template <class T> struct Matrix {
    const T *data;
    int64_t feature_stride, batch_stride;
};

// Columns that a thread transposes or packs in one go, and groups whose rows it computes: whole tiles of the kernels.
constexpr int64_t columns_per_transpose = 64, columns_per_pack = 256, groups_per_product = 16;

inline int threads_for(int64_t work, int threads) { return work < serial_work ? 1 : threads; }

// destination[c, r] = source[r, c]
template <class T>
void transpose(const Kernels<T> &kernels, const transpose_args<T> &args, int64_t rows, int64_t columns, int threads) {
    const int64_t strips = (columns + columns_per_transpose - 1) / columns_per_transpose;
    parallel_for(strips, threads_for(rows * columns, threads), [&](int64_t strip) {
        const int64_t begin = strip * columns_per_transpose;
        kernels.transpose(args, {0, rows, begin, std::min(columns, begin + columns_per_transpose)});
    });
}

// The feature-major form of a matrix: itself, or a transposed copy when its features are what lies side by side.
template <class T> class FeatureMajor {
  public:
    FeatureMajor(const Kernels<T> &kernels, const Matrix<T> &matrix, int64_t features, int64_t batch, int threads)
        : data(matrix.data), stride(matrix.feature_stride) {
        if (matrix.batch_stride == 1 || batch == 1)
            return;
        copy = scratch<T>(features * batch);
        transpose(kernels, {matrix.data, matrix.batch_stride, copy.get(), batch}, batch, features, threads);
        data = copy.get();
        stride = batch;
    }
    const T *data;
    int64_t stride;

  private:
    Scratch<T> copy;
};

// y[b, r] = bias[r] + sum over row r's slots s of values[s] * x[col_indices[s], b]; y is [batch, rows], contiguous.
template <class T>
void spmm(const Kernels<T> &kernels, const Csr &csr, int64_t columns, const T *values, const T *bias,
          const Matrix<T> &x, int64_t batch, T *y, int threads) {
    const FeatureMajor<T> packed(kernels, x, columns, batch, threads);
    const auto result = scratch<T>(csr.rows * batch);
    const spmm_args<T> args{csr, values, bias, packed.data, packed.stride, result.get(), batch, batch};
    // A strip that keeps eight of the widest registers busy; splitting the batch there leaves no tails inside.
    constexpr int64_t batch_quantum = 8 * 64 / sizeof(T);
    const Blocks blocks(csr, batch, batch_quantum, threads);
    parallel_for(blocks.count(), threads, [&](int64_t i) { kernels.spmm(args, blocks[i]); });
    transpose(kernels, {result.get(), batch, y, csr.rows}, csr.rows, batch, threads);
}

// The same product over a plan.
template <class T>
void planned_spmm(const Kernels<T> &kernels, const Plan &plan, const T *values, const T *bias, const Matrix<T> &x,
                  int64_t batch, T *y, int threads) {
    const BucketPlan view = plan.view();
    const int64_t width = kernels.panel_width, panel_count = (batch + width - 1) / width;
    const auto panels = scratch<T>(panel_count * width * view.columns);
    const pack_args<T> pack{x.data, x.feature_stride, x.batch_stride, panels.get(), view.columns, batch};
    // Values are gathered in every call: a copy kept from the last one could be stale, since torch does not count
    // writes that go through `.data`. Packing and gathering share one round of the threads.
    const auto ordered = scratch<T>(plan.nnz());
    const int64_t packs = (view.columns + columns_per_pack - 1) / columns_per_pack;
    const int64_t tasks = packs * panel_count + plan.gather_tasks();
    parallel_for(tasks, threads_for(view.columns * batch + plan.nnz(), threads), [&](int64_t i) {
        if (i >= packs * panel_count) {
            plan.gather(values, ordered.get(), i - packs * panel_count);
            return;
        }
        const int64_t begin = i % packs * columns_per_pack, panel = i / packs;
        kernels.pack(pack, {begin, std::min(view.columns, begin + columns_per_pack), panel, panel + 1});
    });
    const bucketed_args<T> product{view, ordered.get(), bias, panels.get(), y, batch};
    const int64_t products = (view.groups + groups_per_product - 1) / groups_per_product;
    // Neighbouring tasks share a panel, which then stays in cache.
    parallel_for(products * panel_count, threads_for((plan.nnz() + view.rows) * batch, threads), [&](int64_t i) {
        const int64_t begin = i % products * groups_per_product, panel = i / products;
        kernels.bucketed(product, {begin, std::min(view.groups, begin + groups_per_product), panel, panel + 1});
    });
}

// dvalues[s] = sum over b of dy[row of s, b] * x[col_indices[s], b]
template <class T>
void sddmm(const Kernels<T> &kernels, const Csr &csr, int64_t columns, const Matrix<T> &dy, const Matrix<T> &x,
           int64_t batch, T *dvalues, int threads) {
    const FeatureMajor<T> packed_dy(kernels, dy, csr.rows, batch, threads);
    const FeatureMajor<T> packed_x(kernels, x, columns, batch, threads);
    const sddmm_args<T> args{csr, packed_dy.data, packed_dy.stride, packed_x.data, packed_x.stride, dvalues, batch};
    // The batch is not split: a connection's sum must not depend on the number of threads.
    const Blocks blocks(csr, batch, 0, threads);
    parallel_for(blocks.count(), threads, [&](int64_t i) { kernels.sddmm(args, blocks[i]); });
}

} // namespace offpath
