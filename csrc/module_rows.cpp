// The Python face of the kernels on sparse rows; kernels/variant_rows.py is its only caller.
#include "dense_rows.h"
#include "encode.h"
#include "module.h"
#include "row_products.h"
#include "sparse_row_products.h"

namespace nb = nanobind;
using namespace offpath;

namespace {

template <class T>
void call_rows_matmul(int64_t isa, int64_t rows, int64_t width, Address crow_indices, Address indices, Address values,
                      Address weight, int64_t weight_stride, Address y, int threads) {
    nb::gil_scoped_release release;
    rows_matmul<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), at<const T>(values),
                   {at<const T>(weight), weight_stride}, width, {at<T>(y), width}, false, threads);
}

template <class T>
void call_rows_dots(int64_t isa, int64_t rows, int64_t width, Address crow_indices, Address indices, Address dy,
                    int64_t dy_stride, Address weight, int64_t weight_stride, Address dots, int threads) {
    nb::gil_scoped_release release;
    rows_dots<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), {at<const T>(dy), dy_stride},
                 {at<const T>(weight), weight_stride}, width, at<T>(dots), threads);
}

template <class T>
void call_rows_weight_gradient(int64_t isa, int64_t rows, int64_t columns, int64_t width, Address crow_indices,
                               Address indices, Address values, Address dy, int64_t dy_stride, Address gradient,
                               int64_t gradient_stride, bool add, int threads) {
    nb::gil_scoped_release release;
    rows_weight_gradient<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), at<const T>(values),
                            {at<const T>(dy), dy_stride}, columns, width, {at<T>(gradient), gradient_stride}, add,
                            threads);
}

template <class T>
void call_rows_written_out(int64_t rows, int64_t columns, Address crow_indices, Address indices, Address values,
                           Address dense, int threads) {
    nb::gil_scoped_release release;
    rows_written_out<T>(csr_at(crow_indices, indices, rows), at<const T>(values), columns, at<T>(dense), threads);
}

template <class T>
void call_rows_picked(int64_t rows, int64_t columns, Address crow_indices, Address indices, Address dense,
                      Address picked, int threads) {
    nb::gil_scoped_release release;
    rows_picked<T>(csr_at(crow_indices, indices, rows), at<const T>(dense), columns, at<T>(picked), threads);
}

template <class T>
void call_sparse_matmul(int64_t isa, int64_t rows, int64_t columns, int64_t width, Address crow_indices,
                        Address indices, Address values, Address w_crow_indices, Address w_indices, Address w_values,
                        Address y, int threads) {
    nb::gil_scoped_release release;
    sparse_matmul<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), at<const T>(values),
                     {csr_at(w_crow_indices, w_indices, columns), at<const T>(w_values)}, width, at<T>(y), threads);
}

template <class T>
void call_sparse_dots(int64_t isa, int64_t rows, int64_t columns, int64_t width, Address crow_indices, Address indices,
                      Address dy, int64_t dy_stride, Address w_crow_indices, Address w_indices, Address w_values,
                      Address dots, int threads) {
    nb::gil_scoped_release release;
    sparse_dots<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), {at<const T>(dy), dy_stride},
                   {csr_at(w_crow_indices, w_indices, columns), at<const T>(w_values)}, width, at<T>(dots), threads);
}

template <class T>
void call_sparse_weight_gradient(int64_t isa, int64_t rows, int64_t columns, int64_t width, Address crow_indices,
                                 Address indices, Address values, Address dy, int64_t dy_stride, Address w_crow_indices,
                                 Address w_indices, Address gradient, int threads) {
    nb::gil_scoped_release release;
    sparse_weight_gradient<T>(use_kernels<T>(isa), csr_at(crow_indices, indices, rows), at<const T>(values),
                              {at<const T>(dy), dy_stride}, csr_at(w_crow_indices, w_indices, columns), width,
                              at<T>(gradient), threads);
}

template <class T>
void call_topk(int64_t isa, int64_t rows, int64_t columns, int64_t k, Address x, int64_t x_stride, Address values,
               Address indices, int threads) {
    nb::gil_scoped_release release;
    topk<T>(use_kernels<T>(isa), {at<const T>(x), x_stride}, rows, columns, k, at<T>(values), at<int32_t>(indices),
            threads);
}

template <class T>
void call_batch_topk(int64_t isa, int64_t rows, int64_t columns, int64_t k, Address x, int64_t x_stride,
                     Address crow_indices, Address indices, Address values, int threads) {
    nb::gil_scoped_release release;
    batch_topk<T>(use_kernels<T>(isa), {at<const T>(x), x_stride}, rows, columns, k, at<int32_t>(crow_indices),
                  at<int32_t>(indices), at<T>(values), threads);
}

template <class T>
int64_t call_count_above(int64_t isa, int64_t rows, int64_t columns, Address x, int64_t x_stride, Address thresholds,
                         Address crow_indices, int threads) {
    nb::gil_scoped_release release;
    return count_above<T>(use_kernels<T>(isa), {at<const T>(x), x_stride}, rows, columns, at<const T>(thresholds),
                          at<int32_t>(crow_indices), threads);
}

template <class T>
void call_take_above(int64_t isa, int64_t rows, int64_t columns, Address x, int64_t x_stride, Address thresholds,
                     Address crow_indices, Address indices, Address values, int threads) {
    nb::gil_scoped_release release;
    take_above<T>(use_kernels<T>(isa), {at<const T>(x), x_stride}, rows, columns, at<const T>(thresholds),
                  at<const int32_t>(crow_indices), at<int32_t>(indices), at<T>(values), threads);
}

template <class T>
void call_encode_topk(int64_t isa, int64_t batch, int64_t width, int64_t rows, int64_t k, Address x,
                      int64_t x_feature_stride, int64_t x_batch_stride, Address weight, int64_t weight_stride,
                      Address bias, Address values, Address indices, int threads) {
    nb::gil_scoped_release release;
    encode_topk<T>(use_kernels<T>(isa), {at<const T>(x), x_feature_stride, x_batch_stride}, batch, width,
                   {at<const T>(weight), weight_stride}, rows, at<const T>(bias), k, at<T>(values),
                   at<int32_t>(indices), threads);
}

} // namespace

void offpath::bind_rows(nb::module_ &m) {
    m.def("rows_fit", [](int64_t rows, int64_t nnz, int64_t columns, Address crow_indices, Address indices) {
        return rows_fit(csr_at(crow_indices, indices, rows), nnz, columns);
    });
    m.def("count_indices", [](int64_t nnz, int64_t columns, Address indices, Address counts) {
        count_indices(at<const int32_t>(indices), nnz, columns, at<int32_t>(counts));
    });
#define OFFPATH_ROWS(suffix, T)                                                                                        \
    m.def("rows_matmul_" #suffix, &call_rows_matmul<T>);                                                               \
    m.def("rows_dots_" #suffix, &call_rows_dots<T>);                                                                   \
    m.def("rows_weight_gradient_" #suffix, &call_rows_weight_gradient<T>);                                             \
    m.def("rows_written_out_" #suffix, &call_rows_written_out<T>);                                                     \
    m.def("rows_picked_" #suffix, &call_rows_picked<T>);                                                               \
    m.def("sparse_matmul_" #suffix, &call_sparse_matmul<T>);                                                           \
    m.def("sparse_dots_" #suffix, &call_sparse_dots<T>);                                                               \
    m.def("sparse_weight_gradient_" #suffix, &call_sparse_weight_gradient<T>);                                         \
    m.def("topk_" #suffix, &call_topk<T>);                                                                             \
    m.def("batch_topk_" #suffix, &call_batch_topk<T>);                                                                 \
    m.def("count_above_" #suffix, &call_count_above<T>);                                                               \
    m.def("take_above_" #suffix, &call_take_above<T>);                                                                 \
    m.def("encode_topk_" #suffix, &call_encode_topk<T>);
    OFFPATH_ROWS(f32, float)
    OFFPATH_ROWS(f64, double)
    OFFPATH_ROWS(bf16, bfloat16)
#undef OFFPATH_ROWS
}
