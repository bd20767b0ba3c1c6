// The weight gradient as it is called.
#pragma once

#include "products.h"
#include "tiles.h"

namespace offpath {

// Of the second-level cache, what the activations of one round of the weight gradient may fill.
constexpr int64_t cached_activation_bytes = 512 << 10;
constexpr int64_t rows_per_sum = 256;

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
    run_together(threads_for((csr.rows + columns) * batch, threads), dy_panels, x_panels);
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

// The same over a plan and over what was packed.
template <class T> class TiledGradient {
  public:
    TiledGradient(const Kernels<T> &kernels, const Tiles &tiles, const Panels<T> &dy, const Panels<T> &x, int64_t batch,
                  T *dvalues, int threads)
        : sums(scratch<Sum<T>>(tiles.nnz())), kernel(kernels.tiled),
          args{tiles.view(), dy.data(), x.data(), batch, sums.get(), dvalues},
          count(std::min<int64_t>(args.plan.tiles, threads * blocks_per_thread)) {}

    int64_t tasks() const { return count; }
    // Neighbouring tiles, to which rows of dy that stay in cache are common.
    void run(int64_t task) const {
        const Share share{task, count};
        kernel(args, {share.begin(args.plan.tiles), share.end(args.plan.tiles), 0, 0});
    }

  private:
    const Scratch<Sum<T>> sums;
    const Kernel<tiled_args<T>> kernel;
    const tiled_args<T> args;
    const int64_t count;
};

// The weight gradient over tiles, without the other gradients.
template <class T>
void tiled_sddmm(const Kernels<T> &kernels, const Tiles &tiles, const Matrix<T> &dy, const Matrix<T> &x, int64_t batch,
                 T *dvalues, int threads) {
    if (batch == 0) {
        std::fill_n(dvalues, tiles.nnz(), T{});
        return;
    }
    const Panels<T> dy_panels(kernels, dy, tiles.rows, batch), x_panels(kernels, x, tiles.columns, batch);
    run_together(threads_for((tiles.rows + tiles.columns) * batch, threads), dy_panels, x_panels);
    const int workers = threads_for(tiles.nnz() * batch, threads);
    run_together(workers, TiledGradient<T>(kernels, tiles, dy_panels, x_panels, batch, dvalues, workers));
}

// dbias[r] = sum over b of dy[r, b]
template <class T> class BiasGradient {
  public:
    BiasGradient(const Kernels<T> &kernels, const Panels<T> &dy, int64_t rows, int64_t batch, T *dbias)
        : kernel(kernels.row_sums), args{dy.data(), rows, batch, dbias} {}

    int64_t tasks() const { return ceil_div(args.rows, rows_per_sum); }
    void run(int64_t task) const {
        const int64_t begin = task * rows_per_sum;
        kernel(args, {begin, std::min(args.rows, begin + rows_per_sum), 0, 0});
    }

  private:
    const Kernel<row_sums_args<T>> kernel;
    const row_sums_args<T> args;
};

} // namespace offpath
