// The products with int8 values as they are called.
#pragma once

#include "amx_dots.h"
#include "small_products.h"

namespace offpath {

// The product of bitmap_spmm.
template <class T>
void bitmap_int8_spmm(const Kernels<T> &kernels, const BitMatrix &matrix, const Int8Values &weight, const T *bias,
                      const Matrix<T> &x, int64_t batch, T *y, int threads) {
    over_bits(matrix, x, batch, y, threads,
              [&](const T *rows, int64_t tokens, bool finite, T *of_tokens, const Block &block) {
                  kernels.bitmap_int8(
                      {matrix.view(), weight.values, weight.scales, bias, rows, of_tokens, tokens, finite}, block);
              });
}

// With fewer, what it takes to write a weight out in tiles is as much as to multiply it.
constexpr int64_t least_tokens_on_tiles = 12;
static_assert(dots_tokens == strip_lines);

// The product of bitmap_int8_spmm with activations that are rounded to int8, token by token.
template <class T>
void int8_dots(const Kernels<T> &kernels, const BitMatrix &matrix, const Int8Values &weight, const T *bias,
               const Matrix<T> &x, int64_t batch, T *y, int threads) {
    const Bitmap view = matrix.view();
    const int64_t blocks = ceil_div(batch, dots_tokens);
    const bool on_tiles = kernels.amx && batch >= least_tokens_on_tiles;
    // Tiles have room for whole blocks; what is computed of tokens that are not there is nowhere written.
    const int64_t with_room = on_tiles ? blocks * dots_tokens : batch;
    const auto levels = scratch<uint8_t>(with_room * 64 * view.words_per_row);
    const auto sizes = scratch<float>(batch);
    const quantise_tokens_args<T> tokens{x.data,    x.feature_stride,   x.batch_stride, view.columns,
                                         with_room, view.words_per_row, levels.get(),   sizes.get()};
    const int workers_of_tokens = threads_for(batch * view.columns, threads);
    parallel_for(batch, workers_of_tokens, [&](int64_t b) { kernels.quantise_tokens(tokens, {0, 0, b, b + 1}); });
    if (on_tiles) {
        run_together(workers_of_tokens, LevelTiles(*kernels.amx, levels.get(), view.words_per_row, blocks));
        const int workers = threads_for(view.rows * (view.columns + 1) * batch, threads);
        const auto *factor = reinterpret_cast<const int8_t *>(levels.get());
        run_together(workers, DotsOnTiles<T>(kernels, matrix, weight, bias, factor, sizes.get(), batch, y, workers));
        return;
    }
    const int8_dots_args<T> args{view, weight.values, weight.scales, bias, levels.get(), sizes.get(), y};
    const int64_t chunks = ceil_div(view.rows, rows_per_block);
    // Neighbouring tasks share tokens, which then stay in cache.
    parallel_for(chunks * blocks, threads_for(matrix.nnz() * batch, threads), [&](int64_t task) {
        const int64_t row = task % chunks * rows_per_block, token = task / chunks * dots_tokens;
        kernels.int8_dots(args, {row, std::min(view.rows, row + rows_per_block), token,
                                 std::min<int64_t>(batch, token + dots_tokens)});
    });
}

// Tasks that a round of the threads runs, from a function of their number.
template <class Run> struct Tasks {
    int64_t count;
    Run run_task;

    int64_t tasks() const { return count; }
    void run(int64_t task) const { run_task(task); }
};
template <class Run> Tasks(int64_t, Run) -> Tasks<Run>;

// The product of planned_spmm.
template <class T>
void planned_int8_spmm(const Kernels<T> &kernels, const ProductPlan &plan, const Int8Values &weight, const T *bias,
                       const Matrix<T> &x, int64_t batch, T *y, int threads) {
    const BucketPlan order = plan.order();
    const auto ordered = scratch<char>(plan.slot_count() * kernels.layout.value_bytes);
    const auto chunk = [&](int64_t i, int64_t panel) {
        const int64_t begin = i * groups_per_product;
        return Block{begin, std::min(order.groups, begin + groups_per_product), panel, panel + 1};
    };
    const int64_t chunks = ceil_div(order.groups, groups_per_product);
    const Panels<T> panels(kernels, x, plan.columns, batch);
    run_together(threads_for(plan.columns * batch + plan.nnz, threads), panels,
                 Tasks{chunks, [&](int64_t task) {
                           kernels.gather_int8({order, weight.values, ordered.get()}, chunk(task, 0));
                       }});
    const int workers = threads_for((plan.nnz + plan.rows) * batch, threads);
    if (plan.runs) {
        const auto *values = reinterpret_cast<const Sum<T> *>(ordered.get());
        const runs_args<T> args{plan.runs->view(), values, weight.scales, bias, panels.data(), y, batch, false};
        run_together(workers, RunProduct<T>(kernels, args, panels.count));
        return;
    }
    const bucketed_int8_args<T> args{order, ordered.get(), weight.scales, bias, panels.data(), y, batch};
    parallel_for(chunks * panels.count, workers,
                 [&](int64_t task) { kernels.bucketed_int8(args, chunk(task % chunks, task / chunks)); });
}

} // namespace offpath
