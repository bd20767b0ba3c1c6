#include "convolution.h"
#include "parallel.h"
#include "transposed.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace offpath {
namespace {

// Blocks begin and end at whole registers of the narrowest type.
constexpr int64_t block_granule = 32;
// Fewer than in a linear layer: there are fewer columns across, and every thread wants tiles.
constexpr int64_t rows_per_tile = 128;

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// The column of each connection among the taps of all channels, not of its group's alone.
std::vector<int32_t> taps_of_all_channels(const Csr &weight, const Convolution &convolution) {
    const int64_t of_group = convolution.channels / convolution.groups * convolution.taps();
    const int64_t outputs = convolution.out_channels / convolution.groups;
    std::vector<int32_t> result(weight.crow_indices[weight.rows]);
    for (int64_t row = 0; row < weight.rows; ++row)
        for (int32_t s = weight.crow_indices[row]; s < weight.crow_indices[row + 1]; ++s)
            result[s] = weight.col_indices[s] + static_cast<int32_t>(row / outputs * of_group);
    return result;
}

int32_t checked(int64_t entry) {
    if (entry > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("expected a block of fewer than 2^31 entries: channels x (panel + reach of the "
                                    "kernel) is too large; split the channels, or use a smaller dilation");
    return static_cast<int32_t>(entry);
}

} // namespace

// The same for one axis. Tap i reads pixel stride * output + v of the padded-less image, v = i * dilation - padding;
// of the phase v mod stride, that is pixel output + floor(v / stride).
struct Shifts::OfAxis {
    std::vector<int64_t> source, result; // the phases' first pixels
    std::vector<Tap> taps;
    int64_t source_step, result_step, source_size, positions, reach;

    OfAxis(const Axis &axis, bool input_gradient)
        : source_step(input_gradient ? 1 : axis.stride), result_step(input_gradient ? axis.stride : 1),
          source_size(input_gradient ? axis.outputs : axis.size),
          positions(input_gradient ? ceil_div(axis.size, axis.stride) : axis.outputs) {
        std::vector<int64_t> phase, pixel;
        for (int64_t i = 0; i < axis.kernel; ++i) {
            const int64_t v = i * axis.dilation - axis.padding;
            pixel.push_back(floor_div(v, axis.stride));
            phase.push_back(v - pixel.back() * axis.stride);
        }
        const int64_t low = *std::min_element(pixel.begin(), pixel.end());
        const int64_t high = *std::max_element(pixel.begin(), pixel.end());
        reach = high - low;
        if (input_gradient) {
            source = {-high};
            for (int64_t r = 0; r < axis.stride; ++r)
                result.push_back(r);
            for (size_t i = 0; i < pixel.size(); ++i)
                taps.push_back({0, phase[i], high - pixel[i]});
            return;
        }
        std::vector<int64_t> used = phase;
        std::sort(used.begin(), used.end());
        used.erase(std::unique(used.begin(), used.end()), used.end());
        for (const int64_t r : used)
            source.push_back(low * axis.stride + r);
        result = {0};
        for (size_t i = 0; i < pixel.size(); ++i)
            taps.push_back({std::find(used.begin(), used.end(), phase[i]) - used.begin(), 0, pixel[i] - low});
    }

    // How far apart rows of positions must lie: the padding that ends one row may be what begins the next.
    int64_t pitch() const {
        const int64_t reached = positions + reach;
        int64_t pitch = positions;
        for (const int64_t first : source) {
            const auto pixels_below = [&](int64_t bound) {
                return std::clamp<int64_t>(ceil_div(std::max<int64_t>(bound - first, 0), source_step), 0, reached);
            };
            pitch = std::max({pitch, pixels_below(source_size), reached - pixels_below(0)});
        }
        return std::max<int64_t>(pitch, 1);
    }
};

Shifts::Shifts(const OfAxis &rows, const OfAxis &columns)
    : positions{rows.positions, columns.positions, columns.pitch(), 0}, source_row_step(rows.source_step),
      source_column_step(columns.source_step), result_row_step(rows.result_step),
      result_column_step(columns.result_step), reach(rows.reach * columns.pitch() + columns.reach) {
    if (positions.rows > 0 && positions.columns > 0)
        positions.count = (positions.rows - 1) * positions.pitch + positions.columns;
    const auto phases = [](const std::vector<int64_t> &rows, const std::vector<int64_t> &columns) {
        std::vector<Phase> phases;
        for (const int64_t row : rows)
            for (const int64_t column : columns)
                phases.push_back({row, column});
        return phases;
    };
    source_phases = phases(rows.source, columns.source);
    result_phases = phases(rows.result, columns.result);
    const int64_t sources = static_cast<int64_t>(columns.source.size());
    const int64_t results = static_cast<int64_t>(columns.result.size());
    for (const Tap &r : rows.taps)
        for (const Tap &c : columns.taps)
            taps.push_back(
                {r.source * sources + c.source, r.result * results + c.result, r.shift * positions.pitch + c.shift});
}

Shifts Shifts::forward(const Convolution &convolution) {
    return Shifts(OfAxis(convolution.rows, false), OfAxis(convolution.columns, false));
}

Shifts Shifts::input_gradient(const Convolution &convolution) {
    return Shifts(OfAxis(convolution.rows, true), OfAxis(convolution.columns, true));
}

Planes Shifts::source(const Images &images) const {
    return {images, source_phases.data(), static_cast<int64_t>(source_phases.size()), source_row_step,
            source_column_step};
}

Planes Shifts::result(const Images &images) const {
    return {images, result_phases.data(), static_cast<int64_t>(result_phases.size()), result_row_step,
            result_column_step};
}

int64_t Shifts::block_stride(int64_t width) const { return ceil_div(width + reach, block_granule) * block_granule; }

namespace {

Plan plan_forward(const Csr &weight, const Convolution &convolution, const Shifts &shifts, int64_t stride,
                  const Layout &layout, int threads) {
    const int64_t taps = convolution.taps(), columns = convolution.channels * taps;
    const std::vector<int32_t> indices = taps_of_all_channels(weight, convolution);
    Plan plan({weight.crow_indices, indices.data(), weight.rows}, columns, nullptr, layout.columns_per_step, threads);
    std::vector<int32_t> begin(columns + 1);
    for (int64_t c = 0; c < columns; ++c) {
        const Shifts::Tap &tap = shifts.taps[c % taps];
        begin[c] = checked((tap.source * convolution.channels + c / taps) * stride + tap.shift);
    }
    begin[columns] = checked(static_cast<int64_t>(shifts.source_phases.size()) * convolution.channels * stride);
    plan.place_columns(begin.data());
    return plan;
}

// The transposed weight: a row for each phase of each channel of x, whose columns are taps of dy.
Plan plan_input_gradient(const Csr &weight, const Convolution &convolution, const Shifts &shifts, int64_t stride,
                         const Layout &layout, int threads) {
    const int64_t taps = convolution.taps(), columns = convolution.out_channels * taps;
    std::vector<int32_t> indices = taps_of_all_channels(weight, convolution);
    std::vector<int32_t> tap(indices.size());
    for (size_t s = 0; s < indices.size(); ++s) {
        tap[s] = static_cast<int32_t>(indices[s] % taps);
        indices[s] = static_cast<int32_t>(shifts.taps[tap[s]].result * convolution.channels + indices[s] / taps);
    }
    const int64_t rows = static_cast<int64_t>(shifts.result_phases.size()) * convolution.channels;
    const Transposed by_row({weight.crow_indices, indices.data(), weight.rows}, rows);
    for (size_t i = 0; i < indices.size(); ++i)
        indices[i] = checked(by_row.row_of_entry[i] * taps + tap[by_row.slots[i]]);
    Plan plan({by_row.crow_indices.get(), indices.data(), rows}, columns, by_row.slots.get(), layout.columns_per_step,
              threads);
    std::vector<int32_t> begin(columns + 1);
    for (int64_t c = 0; c < columns; ++c)
        begin[c] = checked(c / taps * stride + shifts.taps[c % taps].shift);
    begin[columns] = checked(convolution.out_channels * stride);
    plan.place_columns(begin.data());
    return plan;
}

} // namespace

ConvolutionPlan::ConvolutionPlan(const Csr &weight, const Convolution &convolution, bool input_gradient,
                                 const Layout &layout, int threads)
    : convolution(convolution),
      shifts(input_gradient ? Shifts::input_gradient(convolution) : Shifts::forward(convolution)),
      block_stride(shifts.block_stride(layout.panel_width)),
      plan((input_gradient ? plan_input_gradient : plan_forward)(weight, convolution, shifts, block_stride, layout,
                                                                 threads)) {}

ConvolutionTiles::ConvolutionTiles(const Csr &weight, const Convolution &convolution, const Layout &layout, int threads)
    : ConvolutionTiles(Transposed({weight.crow_indices, taps_of_all_channels(weight, convolution).data(), weight.rows},
                                  convolution.channels * convolution.taps()),
                       convolution, layout, threads) {}

ConvolutionTiles::ConvolutionTiles(const Transposed &taps, const Convolution &convolution, const Layout &layout,
                                   int threads)
    : convolution(convolution), shifts(Shifts::forward(convolution)), channels(convolution.channels),
      out_channels(convolution.out_channels), block_stride(shifts.block_stride(layout.strip_width)),
      tiles({taps.crow_indices.get(), taps.row_of_entry.get(), taps.columns}, out_channels, threads, rows_per_tile),
      row_begin(taps.columns), slots(taps.slots.get(), taps.slots.get() + taps.nnz) {
    for (int64_t row = 0; row < taps.columns; ++row) {
        const Shifts::Tap &tap = shifts.taps[row % convolution.taps()];
        row_begin[row] = checked((tap.source * channels + row / convolution.taps()) * block_stride + tap.shift);
    }
}

int64_t ConvolutionTiles::bytes() const {
    return tiles.bytes() + static_cast<int64_t>((row_begin.size() + slots.size()) * sizeof(int32_t));
}

} // namespace offpath
