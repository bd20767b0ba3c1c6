// The products that fill absent connections with zeros, as they are called.
#pragma once

#include "amx_products.h"
#include "bitmap.h"
#include "gradient.h"

#include <limits>

namespace offpath {

constexpr int64_t panels_per_gradient = 8;

// How many panels share a tile of the weight, of which there are `tiles`, the last one perhaps a part of one: as many
// as let the threads finish first. Panels apart balance better, and fill their tiles anew.
inline int64_t panels_sharing(const Layout &layout, int64_t panels, double tiles, int threads) {
    constexpr double tokens_per_fill = 8; // that could be multiplied instead of filling a tile
    const auto whole_tiles = static_cast<int64_t>(tiles);
    int64_t best = 1;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t most = tokens_per_tile / layout.panel_width; most > 0; --most) {
        const int64_t parts = std::max<int64_t>(ceil_div(panels, most), 1), whole = whole_tiles * parts;
        const int64_t together = std::max<int64_t>(ceil_div(panels, parts), 1);
        const int64_t rounds = ceil_div(whole, threads), idle = rounds * threads - whole;
        const double of_rest = (tiles - whole_tiles) * ceil_div(std::max<int64_t>(parts - idle, 0), threads);
        const double time = (rounds + of_rest) * (together * layout.panel_width + tokens_per_fill);
        if (time < least) {
            least = time;
            best = together;
        }
    }
    return best;
}

// y = x W^T + bias
template <class T> class FilledProduct {
  public:
    FilledProduct(const Kernels<T> &kernels, const BitMatrix &matrix, const AnyValues<T> &weight, const T *bias,
                  const Panels<T> &panels, int64_t batch, T *y, bool feature_major, int threads)
        : kernel(kernels.filled), args{matrix.view(), weight,  bias,
                                       panels.data(), y,       batch,
                                       feature_major, nullptr, tile_stride(matrix, kernels.layout)},
          tile_bytes(tile_groups * group_rows * args.tile_stride * kernels.layout.panel_entry_bytes),
          groups(ceil_div(matrix.rows, group_rows)), chunks(ceil_div(groups, tile_groups)), panels(panels.count),
          panels_per_tile(
              panels_sharing(kernels.layout, panels.count, static_cast<double>(groups) / tile_groups, threads)) {}

    int64_t tasks() const { return chunks * ceil_div(panels, panels_per_tile); }
    void run(int64_t task) const {
        const int64_t group = task % chunks * tile_groups, panel = task / chunks * panels_per_tile;
        const auto tile = scratch<char>(tile_bytes);
        filled_args<T> own = args;
        own.tile = tile.get();
        kernel(own, {group, std::min(groups, group + tile_groups), panel, std::min(panels, panel + panels_per_tile)});
    }

  private:
    // A cache line more than a row's words take: rows of 4 KiB, such as those of 2048 columns in bfloat16, would share
    // the sets of the caches.
    static int64_t tile_stride(const BitMatrix &matrix, const Layout &layout) {
        return 64 * matrix.view().words_per_row + 64 / layout.panel_entry_bytes;
    }

    const Kernel<filled_args<T>> kernel;
    const filled_args<T> args;
    const int64_t tile_bytes, groups, chunks, panels, panels_per_tile;
};

// dx = dy W, over panels of dy
template <class T> class FilledInputGradient {
  public:
    FilledInputGradient(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Panels<T> &dy,
                        int64_t batch, T *dx, bool feature_major, int threads)
        : kernel(kernels.filled_dx), args{matrix.view(),
                                          matrix.chunk_slots(),
                                          values,
                                          dy.data(),
                                          dx,
                                          batch,
                                          feature_major,
                                          rows_per_fill(kernels.layout.panel_entry_bytes),
                                          nullptr,
                                          nullptr},
          tile_bytes(chunk_columns * (std::min(matrix.rows, args.rows_per_fill - 1) + 1) *
                     kernels.layout.panel_entry_bytes),
          sums(matrix.rows > args.rows_per_fill ? tokens_per_tile * chunk_columns : 0), chunks(matrix.chunks()),
          panels(dy.count),
          panels_per_tile(
              panels_sharing(kernels.layout, dy.count, static_cast<double>(matrix.columns) / chunk_columns, threads)) {}

    int64_t tasks() const { return chunks * ceil_div(panels, panels_per_tile); }
    void run(int64_t task) const {
        const int64_t chunk = task % chunks, panel = task / chunks * panels_per_tile;
        const auto tile = scratch<char>(tile_bytes);
        const auto kept = scratch<Sum<T>>(sums);
        filled_dx_args<T> own = args;
        own.tile = tile.get();
        own.sums = kept.get();
        kernel(own, {chunk, chunk + 1, panel, std::min(panels, panel + panels_per_tile)});
    }

  private:
    // What is filled in one go is multiplied while it is in a cache: a Xeon (Sapphire Rapids) is faster with pieces for
    // the first-level one, Zen 4 with pieces for the second.
    static int64_t rows_per_fill(int64_t entry_bytes) {
#if defined(__x86_64__)
        const bool from_second_level = __builtin_cpu_is("amd") != 0;
#else
        const bool from_second_level = false;
#endif
        return ((from_second_level ? 192 : 48) << 10) / (chunk_columns * entry_bytes);
    }

    const Kernel<filled_dx_args<T>> kernel;
    const filled_dx_args<T> args;
    const int64_t tile_bytes, sums, chunks, panels, panels_per_tile;
};

// The connections' entries of dy^T x, over panels of dy and of x, in which tokens and features have changed places.
template <class T> class FilledGradient {
  public:
    FilledGradient(const Kernels<T> &kernels, const BitMatrix &matrix, const Panels<T> &dy, const Panels<T> &x,
                   int64_t batch, T *dvalues)
        : kernel(kernels.filled_dvalues), args{matrix.view(), dy.data(), x.data(), batch, dvalues},
          groups(ceil_div(matrix.rows, group_rows)), chunks(ceil_div(groups, groups_per_gradient)), panels(x.count) {}

    int64_t tasks() const { return chunks * ceil_div(panels, panels_per_gradient); }
    void run(int64_t task) const {
        const int64_t group = task % chunks * groups_per_gradient, panel = task / chunks * panels_per_gradient;
        kernel(args, {group, std::min(groups, group + groups_per_gradient), panel,
                      std::min(panels, panel + panels_per_gradient)});
    }

  private:
    const Kernel<filled_dvalues_args<T>> kernel;
    const filled_dvalues_args<T> args;
    const int64_t groups, chunks, panels;
};

// The filled products over panels.
template <class T> struct OnPanels {
    const Kernels<T> &kernels;

    Panels<T> x_of_product(const Matrix<T> &x, int64_t columns, int64_t batch) const {
        return {kernels, x, columns, batch};
    }
    Panels<T> dy_of_dx(const Matrix<T> &dy, int64_t rows, int64_t batch) const { return {kernels, dy, rows, batch}; }
    Panels<T> dy_of_dvalues(const Matrix<T> &dy, int64_t rows, int64_t batch) const {
        return {kernels, dy, rows, batch};
    }
    Panels<T> x_of_dvalues(const Matrix<T> &x, int64_t columns, int64_t batch) const {
        return {kernels, exchanged(x), batch, columns};
    }
    FilledProduct<T> product(const BitMatrix &matrix, const AnyValues<T> &weight, const T *bias, const Panels<T> &x,
                             int64_t batch, T *y, bool feature_major, int threads) const {
        return {kernels, matrix, weight, bias, x, batch, y, feature_major, threads};
    }
    FilledInputGradient<T> dx(const BitMatrix &matrix, const T *values, const Panels<T> &dy, int64_t batch, T *dx,
                              bool feature_major, int threads) const {
        return {kernels, matrix, values, dy, batch, dx, feature_major, threads};
    }
    FilledGradient<T> dvalues(const BitMatrix &matrix, const Panels<T> &dy, const Panels<T> &x, int64_t batch,
                              T *dvalues) const {
        return {kernels, matrix, dy, x, batch, dvalues};
    }
};

// Calls body with the filled products of an ISA.
template <class T, class Body> void with_filled(const Kernels<T> &kernels, const Body &body) {
    if constexpr (std::is_same_v<T, bfloat16>)
        if (kernels.amx)
            return body(OnTiles{*kernels.amx});
    body(OnPanels<T>{kernels});
}

template <class T>
void filled_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const AnyValues<T> &weight, const T *bias,
                 const Matrix<T> &x, int64_t batch, T *y, bool feature_major, int threads) {
    with_filled(kernels, [&](const auto &filled) {
        const auto factor = filled.x_of_product(x, matrix.columns, batch);
        run_together(threads_for(matrix.columns * batch, threads), factor);
        const int workers = threads_for(matrix.rows * (matrix.columns + 1) * batch, threads);
        run_together(workers, filled.product(matrix, weight, bias, factor, batch, y, feature_major, workers));
    });
}

template <class T>
void filled_dx(const Kernels<T> &kernels, const BitMatrix &matrix, const T *values, const Matrix<T> &dy, int64_t batch,
               T *dx, int threads) {
    with_filled(kernels, [&](const auto &filled) {
        const auto factor = filled.dy_of_dx(dy, matrix.rows, batch);
        run_together(threads_for(matrix.rows * batch, threads), factor);
        const int workers = threads_for((matrix.rows + 1) * matrix.columns * batch, threads);
        run_together(workers, filled.dx(matrix, values, factor, batch, dx, false, workers));
    });
}

template <class T>
void filled_dvalues(const Kernels<T> &kernels, const BitMatrix &matrix, const Matrix<T> &dy, const Matrix<T> &x,
                    int64_t batch, T *dvalues, int threads) {
    if (batch == 0) {
        std::fill_n(dvalues, matrix.nnz(), T{});
        return;
    }
    with_filled(kernels, [&](const auto &filled) {
        const auto of_dy = filled.dy_of_dvalues(dy, matrix.rows, batch);
        const auto of_x = filled.x_of_dvalues(x, matrix.columns, batch);
        run_together(threads_for((matrix.rows + matrix.columns) * batch, threads), of_dy, of_x);
        run_together(threads_for(matrix.rows * matrix.columns * batch, threads),
                     filled.dvalues(matrix, of_dy, of_x, batch, dvalues));
    });
}

} // namespace offpath
