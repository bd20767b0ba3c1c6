// The product of int8 values with int8 activations on AMX as it is called, for an ISA that has it and any dtype.
#pragma once

#include "amx_products.h"

namespace offpath {

// Strips of levels become a right factor, by tasks that any loop may run.
class LevelTiles {
  public:
    LevelTiles(const AmxKernels &kernels, uint8_t *levels, int64_t words, int64_t strips)
        : kernel(kernels.level_tiles), args{levels, words}, strips(strips), packs(ceil_div(words, packed_along)) {}

    int64_t tasks() const { return strips * packs; }
    void run(int64_t task) const {
        const int64_t strip = task / packs, word = task % packs * packed_along;
        kernel(args, {word, std::min(args.words, word + packed_along), strip, strip + 1});
    }

  private:
    const Kernel<level_tiles_args> kernel;
    const level_tiles_args args;
    const int64_t strips, packs;
};

// y of what has the levels `x` as a right factor, and the tokens' sizes.
template <class T> class DotsOnTiles {
  public:
    DotsOnTiles(const Kernels<T> &kernels, const BitMatrix &matrix, const Int8Values &weight, const T *bias,
                const int8_t *x, const float *sizes, int64_t batch, T *y, int threads)
        : dots(kernels.amx->dots), scale(kernels.scale_sums), bitmap(matrix.view()), values(weight.values), x(x),
          scaled{nullptr, 0, weight.scales, sizes, bias, y, matrix.rows}, batch(batch), pairs(pairs_for(matrix.rows)),
          pairs_together(pairs_per_task(pairs, dots_rows, threads)), chunks(ceil_div(pairs, pairs_together)),
          strips(ceil_div(batch, strip_lines)), strips_together(strips_per_task(strips, chunks, threads)) {}

    int64_t tasks() const { return chunks * ceil_div(strips, strips_together); }
    void run(int64_t task) const {
        const int64_t pair = task % chunks * pairs_together, pair_end = std::min(pairs, pair + pairs_together);
        const int64_t strip = task / chunks * strips_together, strip_end = std::min(strips, strip + strips_together);
        const int64_t sums_of_task = pairs_together * ceil_div(strips_together, 2) * pair_sums;
        const auto filled = scratch<int8_t>(2 * pairs_together * tiles_per_step * int8_entries);
        const auto sums = scratch<int32_t>(sums_of_task), totals = scratch<int32_t>(sums_of_task);
        const int64_t stride = (pair_end - pair) * pair_lines;
        dots({bitmap, values, x, totals.get(), stride, filled.get(), sums.get()},
             {2 * pair, 2 * pair_end, strip, strip_end});
        scale_sums_args<T> own = scaled;
        own.sums = totals.get();
        own.sums_stride = stride;
        scale(own, {pair * pair_lines, std::min(bitmap.rows, pair_end * pair_lines), strip * strip_lines,
                    std::min(batch, strip_end * strip_lines)});
    }

  private:
    const Kernel<amx_dots_args> dots;
    const Kernel<scale_sums_args<T>> scale;
    const Bitmap bitmap;
    const int8_t *const values, *const x;
    const scale_sums_args<T> scaled;
    const int64_t batch, pairs, pairs_together, chunks, strips, strips_together;
};

} // namespace offpath
