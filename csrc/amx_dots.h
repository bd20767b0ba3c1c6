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
          scaled{nullptr, 0, weight.scales, sizes, bias, y, matrix.rows}, batch(batch),
          split(matrix.rows, dots_rows, ceil_div(batch, strip_lines), threads) {}

    int64_t tasks() const { return split.count(); }
    void run(int64_t task) const {
        const Block strips = split[task];
        const auto filled = scratch<int8_t>(split.filled_tiles() * int8_entries);
        const auto sums = scratch<int32_t>(split.sums()), totals = scratch<int32_t>(split.sums());
        scale_sums_args<T> own = scaled;
        own.sums = totals.get();
        own.sums_stride = (strips.row_end - strips.row_begin) * strip_lines;
        dots({bitmap, values, x, totals.get(), own.sums_stride, filled.get(), sums.get()}, strips);
        scale(own, {strips.row_begin * strip_lines, std::min(bitmap.rows, strips.row_end * strip_lines),
                    strips.batch_begin * strip_lines, std::min(batch, strips.batch_end * strip_lines)});
    }

  private:
    const Kernel<amx_dots_args> dots;
    const Kernel<scale_sums_args<T>> scale;
    const Bitmap bitmap;
    const int8_t *const values, *const x;
    const scale_sums_args<T> scaled;
    const int64_t batch;
    const StripTasks split;
};

} // namespace offpath
