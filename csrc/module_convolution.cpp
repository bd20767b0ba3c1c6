// The Python face of convolutions: tensors in, as in module_products.cpp.
#include "convolution_products.h"
#include "module.h"
#include "operand.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/unique_ptr.h>

#include <array>
#include <memory>

namespace nb = nanobind;
using namespace offpath;

namespace {

// channels, out_channels, groups; then size, kernel, stride, padding, dilation and outputs of the rows, of the columns.
using Sizes = std::array<int64_t, 15>;

Convolution convolution_of(const Sizes &s) {
    return {s[0], s[1], s[2], {s[3], s[4], s[5], s[6], s[7], s[8]}, {s[9], s[10], s[11], s[12], s[13], s[14]}};
}

template <class T> std::optional<ImageBatch<T>> inputs(const Operand &x, const Convolution &of) {
    return x.images<T>(of.channels, of.rows.size, of.columns.size);
}
template <class T> std::optional<ImageBatch<T>> outputs(const Operand &y, const Convolution &of) {
    return y.images<T>(of.out_channels, of.rows.outputs, of.columns.outputs);
}

// The pattern of a convolution's weight.
std::optional<Csr> weight_of(const Convolution &convolution, const Operand &crow_indices, const Operand &col_indices) {
    const auto csr = csr_of(crow_indices, col_indices);
    return csr && csr->rows == convolution.out_channels ? csr : std::nullopt;
}

// These two are None for operands that do not fit.
template <class T>
std::unique_ptr<ConvolutionPlan> make_convolution_plan(int64_t isa, const Sizes &sizes, bool input_gradient,
                                                       const Operand &crow_indices, const Operand &col_indices,
                                                       int threads) {
    const Convolution convolution = convolution_of(sizes);
    const auto weight = weight_of(convolution, crow_indices, col_indices);
    if (!weight)
        return nullptr;
    nb::gil_scoped_release release;
    return std::make_unique<ConvolutionPlan>(*weight, convolution, input_gradient,
                                             kernels_of<T>(*isas()[isa].table).layout, threads);
}

template <class T>
std::unique_ptr<ConvolutionTiles> make_convolution_tiles(int64_t isa, const Sizes &sizes, const Operand &crow_indices,
                                                         const Operand &col_indices, int threads) {
    const Convolution convolution = convolution_of(sizes);
    const auto weight = weight_of(convolution, crow_indices, col_indices);
    if (!weight)
        return nullptr;
    nb::gil_scoped_release release;
    return std::make_unique<ConvolutionTiles>(*weight, convolution, kernels_of<T>(*isas()[isa].table).layout, threads);
}

bool call_convolve(int64_t isa, const ConvolutionPlan &plan, const Operand &values, const Operand &x,
                   const Operand &bias, const Operand &y, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto in = inputs<const T>(x, plan.convolution);
        const auto out = outputs<T>(y, plan.convolution);
        if (!(values.is_vector<T>(plan.plan.nnz()) && bias.is_vector_or_none<T>(plan.convolution.out_channels) && in &&
              out && in->count == out->count))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, plan);
        nb::gil_scoped_release release;
        convolve<T>(kernels, plan, values.data<const T>(), bias.data<const T>(), in->data, in->images, out->data,
                    out->images, in->count, threads);
        return true;
    });
}

bool call_convolution_dx(int64_t isa, const ConvolutionPlan &plan, const Operand &values, const Operand &dy,
                         const Operand &dx, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto out = outputs<const T>(dy, plan.convolution);
        const auto in = inputs<T>(dx, plan.convolution);
        if (!(values.is_vector<T>(plan.plan.nnz()) && out && in && in->count == out->count))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, plan);
        nb::gil_scoped_release release;
        convolve<T>(kernels, plan, values.data<const T>(), nullptr, out->data, out->images, in->data, in->images,
                    in->count, threads);
        return true;
    });
}

bool call_convolution_dvalues(int64_t isa, const ConvolutionTiles &tiles, const Operand &dy, const Operand &x,
                              const Operand &dvalues, int threads) {
    return by_dtype(dvalues, [&]<class T>() {
        const auto out = outputs<const T>(dy, tiles.convolution);
        const auto in = inputs<const T>(x, tiles.convolution);
        if (!(out && in && in->count == out->count && dvalues.has_room<T>(tiles.nnz())))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, tiles);
        nb::gil_scoped_release release;
        convolution_dvalues<T>(kernels, tiles, out->data, out->images, in->data, in->images, in->count,
                               dvalues.data<T>(), threads);
        return true;
    });
}

} // namespace

void offpath::bind_convolutions(nb::module_ &m) {
    const nb::arg given;
    const auto or_none = nb::arg().none();
    nb::class_<ConvolutionPlan>(m, "ConvolutionPlan").def_prop_ro("bytes", &ConvolutionPlan::bytes);
    nb::class_<ConvolutionTiles>(m, "ConvolutionTiles").def_prop_ro("bytes", &ConvolutionTiles::bytes);
    m.def("convolve", &call_convolve, given, given, given, given, or_none, given, given);
    m.def("convolution_dx", &call_convolution_dx);
    m.def("convolution_dvalues", &call_convolution_dvalues);
#define OFFPATH_CONVOLUTIONS(suffix, T)                                                                                \
    m.def("make_convolution_plan_" #suffix, &make_convolution_plan<T>);                                                \
    m.def("make_convolution_tiles_" #suffix, &make_convolution_tiles<T>);
    OFFPATH_CONVOLUTIONS(f32, float)
    OFFPATH_CONVOLUTIONS(f64, double)
    OFFPATH_CONVOLUTIONS(bf16, bfloat16)
#undef OFFPATH_CONVOLUTIONS
}
