// The products as they are called: activations in any layout in, threads and scratch memory taken care of.
#pragma once

#include "bitmap.h"
#include "parallel.h"
#include "plan.h"
#include "scratch.h"
#include "table.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace offpath {

template <class Args> using Kernel = void (*)(const Args &, const Block &);

// The kernels of one ISA for one dtype.
template <class T> struct Kernels {
    Kernel<spmm_args<Sum<T>>> spmm;
    Kernel<to_features_args<T>> to_features;
    Kernel<to_tokens_args<T>> to_tokens;
    Kernel<gather_args<T>> gather;
    Kernel<pack_args<T>> pack;
    Kernel<bucketed_args<T>> bucketed;
    Kernel<sddmm_args<T>> sddmm;
    Kernel<bitmap_args<T>> bitmap;
    Kernel<expand_args<T>> expand;
    Kernel<compress_args<T>> compress;
    Layout layout;
};

template <class T> Kernels<T> kernels_of(const KernelTable &t) {
    if constexpr (std::is_same_v<T, float>)
        return {t.spmm_f32,  t.to_features_f32, t.to_tokens_f32, t.gather_f32,   t.pack_f32,  t.bucketed_f32,
                t.sddmm_f32, t.bitmap_f32,      t.expand_f32,    t.compress_f32, t.layout_f32};
    else if constexpr (std::is_same_v<T, double>)
        return {t.spmm_f64,  t.to_features_f64, t.to_tokens_f64, t.gather_f64,   t.pack_f64,  t.bucketed_f64,
                t.sddmm_f64, t.bitmap_f64,      t.expand_f64,    t.compress_f64, t.layout_f64};
    else
        return {t.spmm_f32,   t.to_features_bf16, t.to_tokens_bf16, t.gather_bf16,   t.pack_bf16,  t.bucketed_bf16,
                t.sddmm_bf16, t.bitmap_bf16,      t.expand_bf16,    t.compress_bf16, t.layout_bf16};
}

// A [features, batch] matrix as torch hands it over: any strides, one of which is 1.
template <class T> struct Matrix {
    const T *data;
    int64_t feature_stride, batch_stride;
};

// Columns that a thread transposes or packs in one go, and groups whose rows it computes: whole tiles of the kernels.
constexpr int64_t columns_per_transpose = 64, columns_per_pack = 256, groups_per_product = 16, rows_per_task = 64;
// Of the second-level cache, what the activations of one round of the weight gradient may fill.
constexpr int64_t cached_activation_bytes = 512 << 10;

inline int threads_for(int64_t work, int threads) { return work < serial_work ? 1 : threads; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs a kernel over `count` things, `step` in one go, as the rows of its block.
template <class Args> void by_rows(Kernel<Args> kernel, const Args &args, int64_t count, int64_t step, int threads) {
    parallel_for(ceil_div(count, step), threads,
                 [&](int64_t i) { kernel(args, {i * step, std::min(count, (i + 1) * step), 0, 0}); });
}

// The feature-major form of a matrix in the type of the sums: itself, or a copy.
template <class T> class FeatureMajor {
  public:
    FeatureMajor(const Kernels<T> &kernels, const Matrix<T> &matrix, int64_t features, int64_t batch, int threads) {
        if constexpr (std::is_same_v<T, Sum<T>>)
            if (matrix.batch_stride == 1 || batch == 1) {
                data = matrix.data;
                stride = matrix.feature_stride;
                return;
            }
        copy = scratch<Sum<T>>(features * batch);
        const to_features_args<T> args{matrix.data, matrix.batch_stride, matrix.feature_stride, copy.get(), batch};
        parallel_for(ceil_div(features, columns_per_transpose), threads_for(features * batch, threads), [&](int64_t i) {
            const int64_t begin = i * columns_per_transpose;
            kernels.to_features(args, {0, batch, begin, std::min(features, begin + columns_per_transpose)});
        });
        data = copy.get();
        stride = batch;
    }
    const Sum<T> *data;
    int64_t stride;

  private:
    Scratch<Sum<T>> copy;
};

// A vector in the type of the sums: itself, or a copy.
template <class T> class Widened {
  public:
    Widened(const T *vector, int64_t count) {
        if constexpr (std::is_same_v<T, Sum<T>>) {
            data = vector;
        } else if (vector) {
            copy = scratch<Sum<T>>(count);
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t bits = static_cast<uint32_t>(vector[i].bits) << 16;
                std::memcpy(&copy[i], &bits, sizeof bits);
            }
            data = copy.get();
        }
    }
    const Sum<T> *data = nullptr;

  private:
    Scratch<Sum<T>> copy;
};

// y[b, r] = bias[r] + sum over row r's slots s of values[s] * x[col_indices[s], b]; y is [batch, rows], contiguous.
template <class T>
void spmm(const Kernels<T> &kernels, const Csr &csr, int64_t columns, const T *values, const T *bias,
          const Matrix<T> &x, int64_t batch, T *y, int threads) {
    const FeatureMajor<T> features(kernels, x, columns, batch, threads);
    const Widened<T> wide_values(values, csr.crow_indices[csr.rows]), wide_bias(bias, csr.rows);
    const auto result = scratch<Sum<T>>(csr.rows * batch);
    const spmm_args<Sum<T>> args{
        csr, wide_values.data, wide_bias.data, features.data, features.stride, result.get(), batch, batch};
    // A strip that keeps eight of the widest registers busy; splitting the batch there leaves no tails inside.
    constexpr int64_t batch_quantum = 8 * 64 / sizeof(Sum<T>);
    const Blocks blocks(csr, batch, batch_quantum, threads);
    parallel_for(blocks.count(), threads, [&](int64_t i) { kernels.spmm(args, blocks[i]); });
    const to_tokens_args<T> back{result.get(), batch, y, csr.rows};
    parallel_for(ceil_div(batch, columns_per_transpose), threads_for(csr.rows * batch, threads), [&](int64_t i) {
        const int64_t begin = i * columns_per_transpose;
        kernels.to_tokens(back, {0, csr.rows, begin, std::min(batch, begin + columns_per_transpose)});
    });
}

// Activations in panels, packed by tasks that any loop may run.
template <class T> class Panels {
  public:
    Panels(const Kernels<T> &kernels, const Matrix<T> &x, int64_t columns, int64_t batch)
        : count(ceil_div(batch, kernels.layout.panel_width)),
          memory(scratch<char>(count * kernels.layout.panel_width * (columns + 1) * kernels.layout.panel_entry_bytes)),
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

// The product of spmm over a plan.
template <class T>
void planned_spmm(const Kernels<T> &kernels, const Plan &plan, const T *values, const T *bias, const Matrix<T> &x,
                  int64_t batch, T *y, int threads) {
    const BucketPlan view = plan.view();
    const Panels<T> panels(kernels, x, view.columns, batch);
    // Values are gathered in every call: a copy kept from the last one could be stale, since torch does not count
    // writes that go through `.data`. Packing and gathering share one round of the threads.
    const auto ordered = scratch<char>(plan.slot_count() * kernels.layout.value_bytes);
    const gather_args<T> gather{view, values, ordered.get()};
    const int64_t chunks = ceil_div(view.groups, groups_per_product);
    const auto groups = [&](int64_t chunk) {
        return std::pair{chunk * groups_per_product, std::min(view.groups, (chunk + 1) * groups_per_product)};
    };
    parallel_for(panels.tasks() + chunks, threads_for(view.columns * batch + plan.nnz(), threads), [&](int64_t i) {
        if (i < panels.tasks()) {
            panels.run(i);
            return;
        }
        const auto [begin, end] = groups(i - panels.tasks());
        kernels.gather(gather, {begin, end, 0, 0});
    });
    const bucketed_args<T> product{view, ordered.get(), bias, panels.data(), y, batch};
    // Neighbouring tasks share a panel, which then stays in cache.
    parallel_for(chunks * panels.count, threads_for((plan.nnz() + view.rows) * batch, threads), [&](int64_t i) {
        const auto [begin, end] = groups(i % chunks);
        kernels.bucketed(product, {begin, end, i / chunks, i / chunks + 1});
    });
}

// dvalues[s] = sum over b of dy[row of s, b] * x[col_indices[s], b]
template <class T>
void sddmm(const Kernels<T> &kernels, const Csr &csr, int64_t columns, const Matrix<T> &dy, const Matrix<T> &x,
           int64_t batch, T *dvalues, int threads) {
    const int64_t nnz = csr.crow_indices[csr.rows];
    if (batch == 0 || nnz == 0) {
        std::fill_n(dvalues, nnz, T{});
        return;
    }
    const Panels<T> dy_panels(kernels, dy, csr.rows, batch), x_panels(kernels, x, columns, batch);
    const int packing = threads_for((csr.rows + columns) * batch, threads);
    parallel_for(dy_panels.tasks() + x_panels.tasks(), packing,
                 [&](int64_t i) { i < dy_panels.tasks() ? dy_panels.run(i) : x_panels.run(i - dy_panels.tasks()); });
    Scratch<Sum<T>> wide_sums;
    Sum<T> *sums;
    if constexpr (std::is_same_v<T, Sum<T>>) {
        sums = dvalues;
    } else {
        wide_sums = scratch<Sum<T>>(nnz);
        sums = wide_sums.get();
    }
    const sddmm_args<T> args{csr, dy_panels.data(), x_panels.data(), columns, batch, sums, dvalues};
    // As many panels of x at a time as stay in cache. Rounds follow one another, and the batch is not split inside of
    // one: a connection's sum must not depend on the number of threads.
    const int64_t panel_bytes = columns * kernels.layout.panel_width * kernels.layout.panel_entry_bytes;
    const int64_t per_round = std::max<int64_t>(1, cached_activation_bytes / panel_bytes);
    const Blocks blocks(csr, batch, 0, threads);
    for (int64_t panel = 0; panel < x_panels.count; panel += per_round)
        parallel_for(blocks.count(), threads, [&](int64_t i) {
            Block block = blocks[i];
            block.batch_begin = panel;
            block.batch_end = std::min(x_panels.count, panel + per_round);
            kernels.sddmm(args, block);
        });
}

// x - x is NaN for infinities and NaN, and zero else.
template <class T> bool all_finite(const T *x, int64_t count) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        constexpr uint16_t exponent = 0x7F80;
        bool finite = true;
        for (int64_t i = 0; i < count; ++i)
            finite &= (x[i].bits & exponent) != exponent;
        return finite;
    } else {
        T sum = 0;
        for (int64_t i = 0; i < count; ++i)
            sum += x[i] - x[i];
        return sum == 0;
    }
}

// The product of spmm for a few tokens, over bits.
template <class T>
void bitmap_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const T *bias, const Matrix<T> &x,
                 int64_t batch, T *y, int threads) {
    const Bitmap view = matrix.view();
    const int64_t width = 64 * view.words_per_row;
    const auto rows = scratch<T>(bitmap_batch * width);
    for (int64_t first = 0; first < batch; first += bitmap_batch) {
        const int64_t tokens = std::min<int64_t>(bitmap_batch, batch - first);
        for (int64_t t = 0; t < tokens; ++t) {
            const T *source = x.data + (first + t) * x.batch_stride;
            if (x.feature_stride == 1)
                std::copy_n(source, view.columns, &rows[t * width]);
            else
                for (int64_t c = 0; c < view.columns; ++c)
                    rows[t * width + c] = source[c * x.feature_stride];
            std::fill(&rows[t * width] + view.columns, &rows[t * width] + width, T{});
        }
        const bool finite = all_finite(rows.get(), tokens * width);
        const bitmap_args<T> args{view, values, bias, rows.get(), y + first * view.rows, tokens, finite};
        by_rows(kernels.bitmap, args, view.rows, rows_per_task, threads_for(matrix.nnz() * tokens, threads));
    }
}

// dense[r, c] = the value of connection (r, c), or zero.
template <class T>
void expand(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, T *dense, int threads) {
    const expand_args<T> args{matrix.view(), values, dense};
    by_rows(kernels.expand, args, matrix.rows, rows_per_task, threads_for(matrix.rows * matrix.columns, threads));
}

// values[s] = dense[row of s, column of s]
template <class T>
void compress(const Kernels<T> &kernels, const BitMatrix &matrix, const T *dense, T *values, int threads) {
    const compress_args<T> args{matrix.view(), dense, values};
    by_rows(kernels.compress, args, matrix.rows, rows_per_task, threads_for(matrix.rows * matrix.columns, threads));
}

} // namespace offpath
