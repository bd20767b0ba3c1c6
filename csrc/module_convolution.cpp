// The Python face of convolutions; kernels/variant_convolution.py is its only caller.
#include "convolution_products.h"
#include "module.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/unique_ptr.h>

#include <array>
#include <memory>

namespace nb = nanobind;
using namespace offpath;

namespace {

// channels, out_channels, groups; then size, kernel, stride, padding, dilation and outputs of the rows, of the columns.
using Sizes = std::array<int64_t, 15>;
using Strides = std::array<int64_t, 4>; // of images, channels, rows and columns

Convolution convolution_of(const Sizes &s) {
    return {s[0], s[1], s[2], {s[3], s[4], s[5], s[6], s[7], s[8]}, {s[9], s[10], s[11], s[12], s[13], s[14]}};
}

Images images_of_x(const Sizes &sizes, const Strides &s) {
    return {sizes[0], sizes[3], sizes[9], s[0], s[1], s[2], s[3]};
}
Images images_of_y(const Sizes &sizes, const Strides &s) {
    return {sizes[1], sizes[8], sizes[14], s[0], s[1], s[2], s[3]};
}

template <class T>
std::unique_ptr<ConvolutionPlan> make_convolution_plan(int64_t isa, const Sizes &sizes, bool input_gradient,
                                                       Address crow_indices, Address col_indices, int threads) {
    nb::gil_scoped_release release;
    const Convolution convolution = convolution_of(sizes);
    return std::make_unique<ConvolutionPlan>(csr_at(crow_indices, col_indices, convolution.out_channels), convolution,
                                             input_gradient, kernels_of<T>(*isas()[isa].table).layout, threads);
}

template <class T>
std::unique_ptr<ConvolutionTiles> make_convolution_tiles(int64_t isa, const Sizes &sizes, Address crow_indices,
                                                         Address col_indices, int threads) {
    nb::gil_scoped_release release;
    const Convolution convolution = convolution_of(sizes);
    return std::make_unique<ConvolutionTiles>(csr_at(crow_indices, col_indices, convolution.out_channels), convolution,
                                              kernels_of<T>(*isas()[isa].table).layout, threads);
}

template <class T>
void call_convolve(int64_t isa, const ConvolutionPlan &plan, const Sizes &sizes, int64_t images, Address values,
                   Address bias, Address x, const Strides &x_strides, Address y, const Strides &y_strides,
                   int threads) {
    const Kernels<T> &kernels = use_kernels<T>(isa, plan.plan);
    nb::gil_scoped_release release;
    convolve<T>(kernels, plan, at<const T>(values), at<const T>(bias), at<const T>(x), images_of_x(sizes, x_strides),
                at<T>(y), images_of_y(sizes, y_strides), images, threads);
}

template <class T>
void call_convolution_dx(int64_t isa, const ConvolutionPlan &plan, const Sizes &sizes, int64_t images, Address values,
                         Address dy, const Strides &dy_strides, Address dx, const Strides &dx_strides, int threads) {
    const Kernels<T> &kernels = use_kernels<T>(isa, plan.plan);
    nb::gil_scoped_release release;
    convolve<T>(kernels, plan, at<const T>(values), nullptr, at<const T>(dy), images_of_y(sizes, dy_strides), at<T>(dx),
                images_of_x(sizes, dx_strides), images, threads);
}

template <class T>
void call_convolution_dvalues(int64_t isa, const ConvolutionTiles &tiles, const Sizes &sizes, int64_t images,
                              Address dy, const Strides &dy_strides, Address x, const Strides &x_strides,
                              Address dvalues, int threads) {
    const Kernels<T> &kernels = use_kernels<T>(isa);
    nb::gil_scoped_release release;
    convolution_dvalues<T>(kernels, tiles, at<const T>(dy), images_of_y(sizes, dy_strides), at<const T>(x),
                           images_of_x(sizes, x_strides), images, at<T>(dvalues), threads);
}

} // namespace

void offpath::bind_convolutions(nb::module_ &m) {
    nb::class_<ConvolutionPlan>(m, "ConvolutionPlan").def_prop_ro("bytes", &ConvolutionPlan::bytes);
    nb::class_<ConvolutionTiles>(m, "ConvolutionTiles").def_prop_ro("bytes", &ConvolutionTiles::bytes);
#define OFFPATH_CONVOLUTIONS(suffix, T)                                                                                \
    m.def("make_convolution_plan_" #suffix, &make_convolution_plan<T>);                                                \
    m.def("make_convolution_tiles_" #suffix, &make_convolution_tiles<T>);                                              \
    m.def("convolve_" #suffix, &call_convolve<T>);                                                                     \
    m.def("convolution_dx_" #suffix, &call_convolution_dx<T>);                                                         \
    m.def("convolution_dvalues_" #suffix, &call_convolution_dvalues<T>);
    OFFPATH_CONVOLUTIONS(f32, float)
    OFFPATH_CONVOLUTIONS(f64, double)
    OFFPATH_CONVOLUTIONS(bf16, bfloat16)
#undef OFFPATH_CONVOLUTIONS
}
