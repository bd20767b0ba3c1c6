// What a convolution needs to know of its weight's pattern and of the sizes of its images: with every stride, padding
// and dilation, a product of planes that are shifted along one line of positions (plane_args.h).
#pragma once

#include "plan.h"
#include "tiles.h"

#include <vector>

namespace offpath {

// Height or width: sizes of image, kernel and output, in pixels.
struct Axis {
    int64_t size, kernel, stride, padding, dilation, outputs;
};
struct Convolution {
    int64_t channels, out_channels, groups;
    Axis rows, columns;

    int64_t taps() const { return rows.kernel * columns.kernel; }
};

// Where each tap (row by row) reads and writes: from a phase of the source, `shift` positions on, to a phase of the
// result.
class Shifts {
  public:
    // y from x.
    static Shifts forward(const Convolution &convolution);
    // dx from dy.
    static Shifts input_gradient(const Convolution &convolution);

    Planes source(const Images &images) const;
    Planes result(const Images &images) const;
    // Entries from plane to plane in a block of `width` positions.
    int64_t block_stride(int64_t width) const;

    struct Tap {
        int64_t source, result; // phases
        int64_t shift;
    };
    std::vector<Tap> taps;
    std::vector<Phase> source_phases, result_phases;
    Positions positions;

  private:
    struct OfAxis;
    Shifts(const OfAxis &rows, const OfAxis &columns);

    int64_t source_row_step, source_column_step, result_row_step, result_column_step, reach;
};

// The plan of y, or of dx, for blocks as the layout wants them.
class ConvolutionPlan {
  public:
    ConvolutionPlan(const Csr &weight, const Convolution &convolution, bool input_gradient, const Layout &layout,
                    int threads);

    // Whether kernels of this layout read blocks as they are planned.
    bool fits(const Layout &layout) const {
        return plan.fits(layout) && block_stride == shifts.block_stride(layout.panel_width);
    }
    int64_t bytes() const { return plan.bytes(); }

    const Convolution convolution;
    const Shifts shifts;
    const int64_t block_stride;
    const Plan plan;
};

// The plan of the weight gradient: tiles of the transposed weight.
class ConvolutionTiles {
  public:
    ConvolutionTiles(const Csr &weight, const Convolution &convolution, const Layout &layout, int threads);

    int64_t nnz() const { return tiles.nnz(); }
    bool fits(const Layout &layout) const { return block_stride == shifts.block_stride(layout.strip_width); }
    int64_t bytes() const;

    const Convolution convolution;
    const Shifts shifts;
    const int64_t channels, out_channels, block_stride;

  private:
    ConvolutionTiles(const class Transposed &taps, const Convolution &convolution, const Layout &layout, int threads);

  public:
    const Tiles tiles;
    std::vector<int32_t> row_begin; // of each tap of each channel, in a block of x
    std::vector<int32_t> slots;     // of the weight, in the order of the transposed one
};

} // namespace offpath
