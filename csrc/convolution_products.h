// Convolutions as they are called.
#pragma once

#include "convolution.h"
#include "products.h"

namespace offpath {

// What one round of the weight gradient may hold of x and dy in blocks.
constexpr int64_t round_bytes = 4 << 20;

// y over a plan of it, or dx from dy. A task packs the panel that it multiplies. A few panels are made as many as all
// threads take equally often, each a little narrower; where there are still too few, several tasks pack the same one
// and share the groups.
template <class T> class ConvolutionProduct {
  public:
    ConvolutionProduct(const Kernels<T> &kernels, const ConvolutionPlan &plan, const OrderedValues<T> &values,
                       const T *bias, const T *x, const Images &source, T *y, const Images &result, int64_t images,
                       int threads)
        : kernel(kernels.convolve),
          args{plan.plan.view(),
               values.data(),
               bias,
               x,
               plan.shifts.source(source),
               y,
               plan.shifts.result(result),
               plan.shifts.positions,
               panels_for(plan.shifts.positions.count, kernels.layout.panel_width, images, threads),
               plan.block_stride,
               nullptr},
          block_bytes((args.from.phase_count * source.channels + 1) * plan.block_stride *
                      kernels.layout.panel_entry_bytes),
          panels(images * args.panels), groups_per_task(groups_for(panels, args.plan.groups, threads)),
          chunks(ceil_div(args.plan.groups, groups_per_task)) {}

    int64_t tasks() const { return panels * chunks; }
    void run(int64_t task) const {
        const auto block = scratch<char>(block_bytes);
        convolve_args<T> own = args;
        own.block = block.get();
        const int64_t panel = task / chunks, begin = task % chunks * groups_per_task;
        kernel(own, {begin, std::min(args.plan.groups, begin + groups_per_task), panel, panel + 1});
    }

  private:
    // Of an image.
    static int64_t panels_for(int64_t positions, int64_t panel_width, int64_t images, int threads) {
        constexpr int64_t few_per_thread = 8;
        const int64_t least = ceil_div(positions, panel_width), all = images * least;
        if (all == 0 || all >= few_per_thread * threads)
            return least;
        const int64_t even = ceil_div(ceil_div(all, threads) * threads, images);
        return even * panel_width <= 2 * positions ? even : least;
    }

    // All of them, or where there are fewer panels than threads, whole tiles of a part.
    static int64_t groups_for(int64_t panels, int64_t groups, int threads) {
        const int64_t chunks = ceil_div(threads, std::max<int64_t>(panels, 1));
        return std::max<int64_t>(ceil_div(ceil_div(groups, chunks), tile_groups), 1) * tile_groups;
    }

    const Kernel<convolve_args<T>> kernel;
    const convolve_args<T> args;
    const int64_t block_bytes, panels, groups_per_task, chunks;
};

template <class T>
void convolve(const Kernels<T> &kernels, const ConvolutionPlan &plan, const T *values, const T *bias, const T *x,
              const Images &source, T *y, const Images &result, int64_t images, int threads) {
    const OrderedValues<T> ordered(kernels, plan.plan, values);
    // A connection is fetched from anywhere in the values, which takes longer than to multiply it.
    run_together(threads_for(2 * plan.plan.nnz(), threads), ordered);
    const ConvolutionProduct<T> product(kernels, plan, ordered, bias, x, source, y, result, images, threads);
    run_together(threads_for((plan.plan.nnz() + plan.plan.rows) * plan.shifts.positions.count * images, threads),
                 product);
}

// The strips of some images in blocks.
template <class T> class Strips {
  public:
    Strips(const Kernels<T> &kernels, const T *source, const Planes &planes, int64_t pitch, int64_t strips,
           int64_t stride, int64_t first, int64_t count)
        : block(planes.phase_count * planes.images.channels * stride),
          memory(scratch<char>(count * block * kernels.layout.panel_entry_bytes)), kernel(kernels.pack_strips),
          args{source, planes, pitch, strips, stride, first, memory.get()}, count(count) {}

    int64_t tasks() const { return count; }
    void run(int64_t task) const { kernel(args, {0, 0, args.first_strip + task, args.first_strip + task + 1}); }
    const void *data() const { return memory.get(); }

    const int64_t block; // entries

  private:
    const Scratch<char> memory;
    const Kernel<pack_strips_args<T>> kernel;
    const pack_strips_args<T> args;
    const int64_t count;
};

// dvalues. Rounds of strips follow one another, as many as stay in cache, and a connection's sum goes through them in
// order: it does not depend on the number of threads.
template <class T>
void convolution_dvalues(const Kernels<T> &kernels, const ConvolutionTiles &plan, const T *dy, const Images &dy_images,
                         const T *x, const Images &x_images, int64_t images, T *dvalues, int threads) {
    const Positions &positions = plan.shifts.positions;
    const int64_t strips = ceil_div(positions.count, kernels.layout.strip_width), all = strips * images;
    if (all == 0 || plan.nnz() == 0) {
        std::fill_n(dvalues, plan.nnz(), T{});
        return;
    }
    const Phase whole = {0, 0};
    const Planes dy_planes = {dy_images, &whole, 1, 1, 1}, x_planes = plan.shifts.source(x_images);
    const auto sums = scratch<Sum<T>>(plan.nnz());
    const auto ordered = scratch<T>(plan.nnz());
    const TilePlan tiles = plan.tiles.view();
    const int64_t strip_bytes = (x_planes.phase_count * x_images.channels * plan.block_stride +
                                 dy_images.channels * kernels.layout.strip_width) *
                                kernels.layout.panel_entry_bytes;
    const int64_t per_round = std::clamp<int64_t>(round_bytes / strip_bytes, std::min<int64_t>(4, all), all);
    const int workers = threads_for(plan.nnz() * positions.count * images, threads);
    for (int64_t first = 0; first < all; first += per_round) {
        const int64_t count = std::min(per_round, all - first);
        const Strips<T> of_dy(kernels, dy, dy_planes, positions.pitch, strips, kernels.layout.strip_width, first,
                              count);
        const Strips<T> of_x(kernels, x, x_planes, positions.pitch, strips, plan.block_stride, first, count);
        run_together(workers, of_x, of_dy);
        const strip_dots_args<T> args{
            tiles, plan.row_begin.data(), of_x.data(), of_dy.data(), of_x.block, of_dy.block,
            first, positions.count,       strips,      all,          sums.get(), ordered.get()};
        parallel_for(tiles.tiles, workers,
                     [&](int64_t tile) { kernels.strip_dots(args, {tile, tile + 1, first, first + count}); });
    }
    for (int64_t i = 0; i < plan.nnz(); ++i)
        dvalues[plan.slots[i]] = ordered[i];
}

} // namespace offpath
