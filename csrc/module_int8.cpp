// The Python face of the products with int8 values; kernels/variant_int8.py is its only caller.
#include "int8_products.h"
#include "module.h"

namespace nb = nanobind;
using namespace offpath;

namespace {

template <class T>
void call_bitmap_int8_spmm(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address scales,
                           Address bias, Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y,
                           int threads) {
    nb::gil_scoped_release release;
    bitmap_int8_spmm<T>(use_kernels<T>(isa), matrix, {at<const int8_t>(values), at<const float>(scales)},
                        at<const T>(bias), {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y),
                        threads);
}

template <class T>
void call_int8_dots(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address scales, Address bias,
                    Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y, int threads) {
    nb::gil_scoped_release release;
    int8_dots<T>(use_kernels<T>(isa), matrix, {at<const int8_t>(values), at<const float>(scales)}, at<const T>(bias),
                 {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

template <class T>
void call_planned_int8_spmm(int64_t isa, const ProductPlan &plan, int64_t batch, Address values, Address scales,
                            Address bias, Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y,
                            int threads) {
    const Kernels<T> &kernels = use_kernels<T>(isa, plan);
    nb::gil_scoped_release release;
    planned_int8_spmm<T>(kernels, plan, {at<const int8_t>(values), at<const float>(scales)}, at<const T>(bias),
                         {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

} // namespace

namespace offpath {

void bind_int8(nb::module_ &m) {
#define OFFPATH_INT8_PRODUCTS(suffix, T)                                                                               \
    m.def("bitmap_int8_spmm_" #suffix, &call_bitmap_int8_spmm<T>);                                                     \
    m.def("int8_dots_" #suffix, &call_int8_dots<T>);                                                                   \
    m.def("planned_int8_spmm_" #suffix, &call_planned_int8_spmm<T>);
    OFFPATH_INT8_PRODUCTS(f32, float)
    OFFPATH_INT8_PRODUCTS(f64, double)
    OFFPATH_INT8_PRODUCTS(bf16, bfloat16)
#undef OFFPATH_INT8_PRODUCTS
}

} // namespace offpath
