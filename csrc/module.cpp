// The Python face of the kernels; this file and module_*.cpp are the only ones that know Python. It takes raw
// addresses: kernels/cpu.py is its only caller and has checked device, dtype, shape, strides and the pattern before.
#include "module.h"
#include "backward.h"
#include "bitmap_backward.h"
#include "digest.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <memory>
#include <numeric>
#include <vector>

namespace nb = nanobind;
using namespace offpath;

namespace {

template <class T>
void call_spmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
               Address values, Address bias, Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y,
               int threads) {
    nb::gil_scoped_release release;
    spmm<T>(use_kernels<T>(isa), csr_at(crow_indices, col_indices, rows), columns, at<const T>(values),
            at<const T>(bias), {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

template <class T>
void call_sddmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
                Address dy, int64_t dy_feature_stride, int64_t dy_batch_stride, Address x, int64_t x_feature_stride,
                int64_t x_batch_stride, Address dvalues, int threads) {
    nb::gil_scoped_release release;
    sddmm<T>(use_kernels<T>(isa), csr_at(crow_indices, col_indices, rows), columns,
             {at<const T>(dy), dy_feature_stride, dy_batch_stride}, {at<const T>(x), x_feature_stride, x_batch_stride},
             batch, at<T>(dvalues), threads);
}

template <class T>
std::unique_ptr<ProductPlan> make_plan(int64_t isa, int64_t rows, int64_t columns, Address crow_indices,
                                       Address col_indices, Address permutation, int threads) {
    const Layout &layout = kernels_of<T>(*isas()[isa].table).layout;
    nb::gil_scoped_release release;
    return std::make_unique<ProductPlan>(csr_at(crow_indices, col_indices, rows), columns,
                                         at<const int32_t>(permutation), layout, threads);
}

template <class T>
void call_planned_spmm(int64_t isa, const ProductPlan &plan, int64_t batch, Address values, Address bias, Address x,
                       int64_t x_feature_stride, int64_t x_batch_stride, Address y, bool feature_major, int threads) {
    const Kernels<T> &kernels = use_kernels<T>(isa, plan);
    nb::gil_scoped_release release;
    planned_spmm<T>(kernels, plan, at<const T>(values), at<const T>(bias),
                    {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), feature_major, threads);
}

std::unique_ptr<Tiles> make_tiles(int64_t rows, int64_t columns, Address crow_indices, Address col_indices,
                                  int threads) {
    nb::gil_scoped_release release;
    return std::make_unique<Tiles>(csr_at(crow_indices, col_indices, rows), columns, threads);
}

template <class T>
void call_tiled_sddmm(int64_t isa, const Tiles &tiles, int64_t batch, Address dy, int64_t dy_feature_stride,
                      int64_t dy_batch_stride, Address x, int64_t x_feature_stride, int64_t x_batch_stride,
                      Address dvalues, int threads) {
    nb::gil_scoped_release release;
    tiled_sddmm<T>(use_kernels<T>(isa), tiles, {at<const T>(dy), dy_feature_stride, dy_batch_stride},
                   {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(dvalues), threads);
}

std::unique_ptr<BitMatrix> make_bitmap(int64_t rows, int64_t columns, Address crow_indices, Address col_indices,
                                       int threads) {
    nb::gil_scoped_release release;
    return std::make_unique<BitMatrix>(csr_at(crow_indices, col_indices, rows), columns, threads);
}

template <class T>
void call_bitmap_spmm(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address bias, Address x,
                      int64_t x_feature_stride, int64_t x_batch_stride, Address y, int threads) {
    nb::gil_scoped_release release;
    bitmap_spmm<T>(use_kernels<T>(isa), matrix, at<const T>(values), at<const T>(bias),
                   {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

template <class T>
void call_bitmap_dx(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address dy,
                    int64_t dy_feature_stride, int64_t dy_batch_stride, Address dx, int threads) {
    nb::gil_scoped_release release;
    bitmap_dx<T>(use_kernels<T>(isa), matrix, at<const T>(values),
                 {at<const T>(dy), dy_feature_stride, dy_batch_stride}, batch, at<T>(dx), threads);
}

template <class T>
void call_bitmap_dvalues(int64_t isa, const BitMatrix &matrix, int64_t batch, Address dy, int64_t dy_feature_stride,
                         int64_t dy_batch_stride, Address x, int64_t x_feature_stride, int64_t x_batch_stride,
                         Address dvalues, int threads) {
    nb::gil_scoped_release release;
    bitmap_dvalues<T>(use_kernels<T>(isa), matrix, {at<const T>(dy), dy_feature_stride, dy_batch_stride},
                      {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(dvalues), threads);
}

template <class T>
void call_filled_spmm(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address bias, Address x,
                      int64_t x_feature_stride, int64_t x_batch_stride, Address y, bool feature_major, int threads) {
    nb::gil_scoped_release release;
    filled_spmm<T>(use_kernels<T>(isa), matrix, at<const T>(values), at<const T>(bias),
                   {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), feature_major, threads);
}

template <class T>
void call_filled_dx(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address dy,
                    int64_t dy_feature_stride, int64_t dy_batch_stride, Address dx, int threads) {
    nb::gil_scoped_release release;
    filled_dx<T>(use_kernels<T>(isa), matrix, at<const T>(values),
                 {at<const T>(dy), dy_feature_stride, dy_batch_stride}, batch, at<T>(dx), threads);
}

template <class T>
void call_filled_dvalues(int64_t isa, const BitMatrix &matrix, int64_t batch, Address dy, int64_t dy_feature_stride,
                         int64_t dy_batch_stride, Address x, int64_t x_feature_stride, int64_t x_batch_stride,
                         Address dvalues, int threads) {
    nb::gil_scoped_release release;
    filled_dvalues<T>(use_kernels<T>(isa), matrix, {at<const T>(dy), dy_feature_stride, dy_batch_stride},
                      {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(dvalues), threads);
}

template <class Made> const Made *unless_none(nb::handle made) {
    return made.is_none() ? nullptr : nb::cast<const Made *>(made);
}

// `made` holds a transposed plan, tiles and bits: what the gradients are to go over, and None for the rest.
template <class T>
void call_backward(int64_t isa, const nb::tuple &made, int64_t rows, int64_t columns, int64_t nnz, int64_t batch,
                   Address values, Address dy, int64_t dy_feature_stride, int64_t dy_batch_stride, Address x,
                   int64_t x_feature_stride, int64_t x_batch_stride, Address dx, bool feature_major, Address dvalues,
                   Address dbias, int threads) {
    const Ways ways = {unless_none<ProductPlan>(made[0]), unless_none<Tiles>(made[1]), unless_none<BitMatrix>(made[2])};
    const Kernels<T> &kernels = ways.transpose ? use_kernels<T>(isa, *ways.transpose) : use_kernels<T>(isa);
    nb::gil_scoped_release release;
    backward<T>(kernels, ways, rows, columns, nnz, at<const T>(values),
                {at<const T>(dy), dy_feature_stride, dy_batch_stride},
                {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(dx), feature_major, at<T>(dvalues),
                at<T>(dbias), threads);
}

template <class T>
void call_bitmap_backward(int64_t isa, const BitMatrix &matrix, int64_t batch, Address values, Address dy,
                          int64_t dy_feature_stride, int64_t dy_batch_stride, Address x, int64_t x_feature_stride,
                          int64_t x_batch_stride, bool fills_dx, bool fills_dvalues, Address dx, Address dvalues,
                          Address dbias, int threads) {
    nb::gil_scoped_release release;
    bitmap_backward<T>(use_kernels<T>(isa), matrix, at<const T>(values),
                       {at<const T>(dy), dy_feature_stride, dy_batch_stride},
                       {at<const T>(x), x_feature_stride, x_batch_stride}, batch, fills_dx, fills_dvalues, at<T>(dx),
                       at<T>(dvalues), at<T>(dbias), threads);
}

template <class T> void call_expand(int64_t isa, const BitMatrix &matrix, Address values, Address dense, int threads) {
    nb::gil_scoped_release release;
    expand<T>(use_kernels<T>(isa), matrix, at<const T>(values), at<T>(dense), threads);
}

template <class T>
void call_compress(int64_t isa, const BitMatrix &matrix, Address dense, Address values, int threads) {
    nb::gil_scoped_release release;
    compress<T>(use_kernels<T>(isa), matrix, at<const T>(dense), at<T>(values), threads);
}

// A torch tensor over a kept block, which comes back when the tensor dies.
template <class T> nb::ndarray<nb::pytorch> take_output(const std::vector<size_t> &shape) {
    void *block = take_scratch(std::accumulate(shape.begin(), shape.end(), sizeof(T), std::multiplies<size_t>()));
    const nb::capsule owner(block, [](void *p) noexcept { give_back_scratch(p); });
    constexpr auto code = std::is_same_v<T, bfloat16> ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
    constexpr nb::dlpack::dtype dtype{static_cast<uint8_t>(code), 8 * sizeof(T), 1};
    return nb::ndarray<nb::pytorch>(block, shape.size(), shape.data(), owner, nullptr, dtype, nb::device::cpu::value);
}

} // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // DistributedDataParallel keeps its model alive until the process has ended
    find_pool();
    m.def("isas", [] {
        std::vector<std::pair<std::string, bool>> result;
        for (const Isa &isa : isas())
            result.emplace_back(isa.table->isa, isa.runs_here);
        return result;
    });
    m.def("calls", &calls);
    m.def("pool_library", &pool_library);
    m.def("kept_scratch_bytes", &kept_scratch_bytes);
    m.def("digest", [](int64_t rows, int64_t nnz, Address crow_indices, Address col_indices) {
        const uint64_t first = digest(at<const int32_t>(crow_indices), rows + 1, 0);
        return digest(at<const int32_t>(col_indices), nnz, first);
    });
    bind_rows(m);
    bind_int8(m);
    bind_convolutions(m);
    nb::class_<ProductPlan>(m, "Plan").def_prop_ro("bytes", &ProductPlan::bytes);
    nb::class_<Tiles>(m, "Tiles").def_prop_ro("bytes", &Tiles::bytes);
    m.def("make_tiles", &make_tiles);
    nb::class_<BitMatrix>(m, "Bitmap").def_prop_ro("bytes", &BitMatrix::bytes);
    m.def("make_bitmap", &make_bitmap);
#define OFFPATH_PRODUCTS(suffix, T)                                                                                    \
    m.def("make_plan_" #suffix, &make_plan<T>);                                                                        \
    m.def("spmm_" #suffix, &call_spmm<T>);                                                                             \
    m.def("sddmm_" #suffix, &call_sddmm<T>);                                                                           \
    m.def("backward_" #suffix, &call_backward<T>);                                                                     \
    m.def("tiled_sddmm_" #suffix, &call_tiled_sddmm<T>);                                                               \
    m.def("planned_spmm_" #suffix, &call_planned_spmm<T>);                                                             \
    m.def("bitmap_spmm_" #suffix, &call_bitmap_spmm<T>);                                                               \
    m.def("bitmap_dx_" #suffix, &call_bitmap_dx<T>);                                                                   \
    m.def("bitmap_dvalues_" #suffix, &call_bitmap_dvalues<T>);                                                         \
    m.def("bitmap_backward_" #suffix, &call_bitmap_backward<T>);                                                       \
    m.def("filled_spmm_" #suffix, &call_filled_spmm<T>);                                                               \
    m.def("filled_dx_" #suffix, &call_filled_dx<T>);                                                                   \
    m.def("filled_dvalues_" #suffix, &call_filled_dvalues<T>);                                                         \
    m.def("expand_" #suffix, &call_expand<T>);                                                                         \
    m.def("compress_" #suffix, &call_compress<T>);                                                                     \
    m.def("take_output_" #suffix, &take_output<T>);
    OFFPATH_PRODUCTS(f32, float)
    OFFPATH_PRODUCTS(f64, double)
    OFFPATH_PRODUCTS(bf16, bfloat16)
#undef OFFPATH_PRODUCTS
}
