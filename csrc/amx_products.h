// The filled products on AMX as they are called, for an ISA that has it: bfloat16 alone.
#pragma once

#include "amx_args.h"
#include "bitmap.h"
#include "products.h"

namespace offpath {

// Tiles that a task packs in the direction in which the matrix lies in memory, and in the other.
constexpr int64_t packed_along = 16, packed_across = 4;
// Tokens of a task at most.
constexpr int64_t tokens_per_amx_task = 512;

inline int64_t pairs_for(int64_t lines) { return ceil_div(lines, pair_lines); }

// A matrix as strips of tiles, packed by tasks that any loop may run: its batch has the lines, its features are what is
// summed over.
class TileStrips {
  public:
    TileStrips(const AmxKernels &kernels, const Matrix<bfloat16> &matrix, int64_t features, int64_t batch, bool right)
        : count(ceil_div(batch, strip_lines)), tiles(ceil_div(features, tile_depth)),
          memory(scratch<bfloat16>(pairs_for(batch) * 2 * tiles * tile_entries)), kernel(kernels.pack),
          args{matrix.data, matrix.feature_stride, matrix.batch_stride, memory.get(), features, batch, right},
          strips(2 * pairs_for(batch)), tiles_together(args.inner_stride == 1 ? packed_along : packed_across),
          strips_together(args.inner_stride == 1 ? packed_across : packed_along),
          packs(ceil_div(tiles, tiles_together)) {}

    int64_t tasks() const { return packs * ceil_div(strips, strips_together); }
    void run(int64_t task) const {
        const int64_t tile = task % packs * tiles_together, strip = task / packs * strips_together;
        kernel(args, {tile, std::min(tiles, tile + tiles_together), strip, std::min(strips, strip + strips_together)});
    }
    const bfloat16 *data() const { return memory.get(); }

    const int64_t count;

  private:
    const int64_t tiles;
    const Scratch<bfloat16> memory;
    const Kernel<pack_tiles_args> kernel;
    const pack_tiles_args args;
    const int64_t strips, tiles_together, strips_together, packs;
};

// Strips of tokens in a task where there are so many tasks beside: fewer, if threads would wait for others.
inline int64_t strips_per_task(int64_t strips, int64_t tasks, int threads) {
    const int64_t parts = ceil_div(2 * threads, std::max<int64_t>(tasks, 1));
    return std::clamp<int64_t>(2 * ceil_div(ceil_div(strips, 2), parts), 2, tokens_per_amx_task / strip_lines);
}

// The tasks of a product of strips of rows, `most_rows` in a task at most, with strips of tokens.
struct StripTasks {
    const int64_t pairs, pairs_together, chunks, strips, strips_together;

    StripTasks(int64_t rows, int64_t most_rows, int64_t strips, int threads)
        : pairs(pairs_for(rows)), pairs_together(std::clamp<int64_t>(pairs / (4 * threads), 1, most_rows / pair_lines)),
          chunks(ceil_div(pairs, pairs_together)), strips(strips),
          strips_together(strips_per_task(strips, chunks, threads)) {}

    int64_t count() const { return chunks * ceil_div(strips, strips_together); }
    Block operator[](int64_t task) const {
        const int64_t pair = task % chunks * pairs_together, strip = task / chunks * strips_together;
        return {2 * pair, 2 * std::min(pairs, pair + pairs_together), strip, std::min(strips, strip + strips_together)};
    }
    // What one of them needs: the tiles of a step of its rows, and the sums of its pairs.
    int64_t filled_tiles() const { return 2 * pairs_together * tiles_per_step; }
    int64_t sums() const { return pairs_together * ceil_div(strips_together, 2) * pair_sums; }
};

// y = x W^T + bias
class AmxProduct {
  public:
    AmxProduct(const AmxKernels &kernels, const BitMatrix &matrix, const AnyValues<bfloat16> &weight,
               const bfloat16 *bias, const TileStrips &x, int64_t batch, bfloat16 *y, bool feature_major, int threads)
        : kernel(kernels.product),
          args{matrix.view(), weight, bias, x.data(), y, batch, feature_major, nullptr, nullptr},
          split(matrix.rows, amx_rows, x.count, threads) {}

    int64_t tasks() const { return split.count(); }
    void run(int64_t task) const {
        const auto filled = scratch<bfloat16>(split.filled_tiles() * tile_entries);
        const auto sums = scratch<float>(split.sums());
        amx_product_args own = args;
        own.filled = filled.get();
        own.sums = sums.get();
        kernel(own, split[task]);
    }

  private:
    const Kernel<amx_product_args> kernel;
    const amx_product_args args;
    const StripTasks split;
};

// dx = dy W
class AmxInputGradient {
  public:
    AmxInputGradient(const AmxKernels &kernels, const BitMatrix &matrix, const bfloat16 *values, const TileStrips &dy,
                     int64_t batch, bfloat16 *dx, bool feature_major, int threads)
        : kernel(kernels.dx),
          args{matrix.view(), matrix.chunk_slots(), values, dy.data(), dx, batch, feature_major, nullptr, nullptr},
          chunks(matrix.chunks()), strips(dy.count), chunks_together(most_together(chunks, strips, threads)),
          tasks_of_chunks(ceil_div(chunks, chunks_together)),
          strips_together(strips_per_task(strips, tasks_of_chunks, threads)) {}

    int64_t tasks() const { return tasks_of_chunks * ceil_div(strips, strips_together); }
    void run(int64_t task) const {
        constexpr int64_t strips_of_chunk = chunk_columns / strip_lines;
        const int64_t chunk = task % tasks_of_chunks * chunks_together;
        const int64_t strip = task / tasks_of_chunks * strips_together;
        const auto filled = scratch<bfloat16>(chunks_together * strips_of_chunk * dx_strip_stride);
        const auto sums =
            scratch<float>(chunks_together * ceil_div(strips_together, 2) * strips_of_chunk / 2 * pair_sums);
        amx_dx_args own = args;
        own.filled = filled.get();
        own.sums = sums.get();
        kernel(own,
               {chunk, std::min(chunks, chunk + chunks_together), strip, std::min(strips, strip + strips_together)});
    }

  private:
    // With few tokens, rows of the weight are read in longer pieces: their sums have room in the cache. Not so long
    // that the tokens would be split, each part of which fills the weight anew.
    static int64_t most_together(int64_t chunks, int64_t strips, int threads) {
        const int64_t fitting = tokens_per_amx_task / strip_lines / std::max<int64_t>(strips, 1);
        const int64_t tasks = strips <= 2 ? threads : 2 * threads;
        return std::clamp<int64_t>(std::min(fitting, chunks / tasks), 1, 4);
    }

    const Kernel<amx_dx_args> kernel;
    const amx_dx_args args;
    const int64_t chunks, strips, chunks_together, tasks_of_chunks, strips_together;
};

// The connections' entries of dy^T x
class AmxGradient {
  public:
    AmxGradient(const AmxKernels &kernels, const BitMatrix &matrix, const TileStrips &dy, const TileStrips &x,
                int64_t batch, bfloat16 *dvalues)
        : kernel(kernels.dvalues), args{matrix.view(), dy.data(), x.data(), batch, dvalues, nullptr},
          strips_of_rows(2 * pairs_for(matrix.rows)), strips_of_columns(2 * pairs_for(matrix.columns)),
          blocks_of_columns(ceil_div(strips_of_columns, columns_together)) {}

    int64_t tasks() const { return ceil_div(strips_of_rows, rows_together) * blocks_of_columns; }
    void run(int64_t task) const {
        // Neighbours end and begin in the same cache lines of dvalues: they are for one thread.
        const int64_t row = task / blocks_of_columns * rows_together;
        const int64_t column = task % blocks_of_columns * columns_together;
        const auto sums = scratch<float>(gradient_rows * gradient_columns);
        amx_dvalues_args own = args;
        own.sums = sums.get();
        kernel(own, {row, std::min(strips_of_rows, row + rows_together), column,
                     std::min(strips_of_columns, column + columns_together)});
    }

  private:
    static constexpr int64_t rows_together = gradient_rows / strip_lines;
    static constexpr int64_t columns_together = gradient_columns / strip_lines;
    const Kernel<amx_dvalues_args> kernel;
    const amx_dvalues_args args;
    const int64_t strips_of_rows, strips_of_columns, blocks_of_columns;
};

// dbias[r] = sum over b of dy[b, r], of the left factor of the weight gradient
class LineSums {
  public:
    LineSums(const AmxKernels &kernels, const TileStrips &dy, int64_t rows, int64_t batch, bfloat16 *dbias)
        : kernel(kernels.line_sums), args{dy.data(), dbias, batch, rows}, strips(dy.count) {}

    int64_t tasks() const { return ceil_div(strips, strips_together); }
    void run(int64_t task) const {
        const int64_t begin = task * strips_together;
        kernel(args, {begin, std::min(strips, begin + strips_together), 0, 0});
    }

  private:
    static constexpr int64_t strips_together = 16;
    const Kernel<line_sums_args> kernel;
    const line_sums_args args;
    const int64_t strips;
};

// The filled products of an ISA that has AMX; OnPanels offers the same for the others.
struct OnTiles {
    const AmxKernels &kernels;

    TileStrips x_of_product(const Matrix<bfloat16> &x, int64_t columns, int64_t batch) const {
        return {kernels, x, columns, batch, true};
    }
    TileStrips dy_of_dx(const Matrix<bfloat16> &dy, int64_t rows, int64_t batch) const {
        return {kernels, dy, rows, batch, false};
    }
    TileStrips dy_of_dvalues(const Matrix<bfloat16> &dy, int64_t rows, int64_t batch) const {
        return {kernels, exchanged(dy), batch, rows, false};
    }
    TileStrips x_of_dvalues(const Matrix<bfloat16> &x, int64_t columns, int64_t batch) const {
        return {kernels, exchanged(x), batch, columns, true};
    }
    AmxProduct product(const BitMatrix &matrix, const AnyValues<bfloat16> &weight, const bfloat16 *bias,
                       const TileStrips &x, int64_t batch, bfloat16 *y, bool feature_major, int threads) const {
        return {kernels, matrix, weight, bias, x, batch, y, feature_major, threads};
    }
    AmxInputGradient dx(const BitMatrix &matrix, const bfloat16 *values, const TileStrips &dy, int64_t batch,
                        bfloat16 *dx, bool feature_major, int threads) const {
        return {kernels, matrix, values, dy, batch, dx, feature_major, threads};
    }
    AmxGradient dvalues(const BitMatrix &matrix, const TileStrips &dy, const TileStrips &x, int64_t batch,
                        bfloat16 *dvalues) const {
        return {kernels, matrix, dy, x, batch, dvalues};
    }
};

} // namespace offpath
