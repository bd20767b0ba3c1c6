// The Python face of the kernels, and the only file that knows Python. It takes raw addresses: kernels/cpu.py is
// its only caller and has checked device, dtype, shape, strides and the pattern before.
#include "digest.h"
#include "isa.h"
#include "products.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

namespace nb = nanobind;
using namespace offpath;

namespace {

using Address = uintptr_t;

template <class T> T *at(Address address) { return reinterpret_cast<T *>(address); }

Csr csr_at(Address crow_indices, Address col_indices, int64_t rows) {
    return {at<const int32_t>(crow_indices), at<const int32_t>(col_indices), rows};
}

// The kernels for T in the variant `isa`, counted as one call of it.
template <class T> Kernels<T> kernels_of(int64_t isa) {
    const KernelTable &table = use_table(isa);
    const int64_t width = table.panel_bytes / static_cast<int64_t>(sizeof(T));
    if constexpr (sizeof(T) == 4)
        return {table.spmm_f32, table.sddmm_f32, table.transpose_f32, table.pack_f32, table.bucketed_f32, width};
    else
        return {table.spmm_f64, table.sddmm_f64, table.transpose_f64, table.pack_f64, table.bucketed_f64, width};
}

template <class T>
void call_spmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
               Address values, Address bias, Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y,
               int threads) {
    nb::gil_scoped_release release;
    spmm<T>(kernels_of<T>(isa), csr_at(crow_indices, col_indices, rows), columns, at<const T>(values),
            at<const T>(bias), {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

template <class T>
void call_sddmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
                Address dy, int64_t dy_feature_stride, int64_t dy_batch_stride, Address x, int64_t x_feature_stride,
                int64_t x_batch_stride, Address dvalues, int threads) {
    nb::gil_scoped_release release;
    sddmm<T>(kernels_of<T>(isa), csr_at(crow_indices, col_indices, rows), columns,
             {at<const T>(dy), dy_feature_stride, dy_batch_stride}, {at<const T>(x), x_feature_stride, x_batch_stride},
             batch, at<T>(dvalues), threads);
}

std::unique_ptr<Plan> make_plan(int64_t rows, int64_t columns, Address crow_indices, Address col_indices,
                                Address permutation, int threads) {
    nb::gil_scoped_release release;
    return std::make_unique<Plan>(csr_at(crow_indices, col_indices, rows), columns, at<const int32_t>(permutation),
                                  threads);
}

template <class T>
void call_planned_spmm(int64_t isa, const Plan &plan, int64_t batch, Address values, Address bias, Address x,
                       int64_t x_feature_stride, int64_t x_batch_stride, Address y, int threads) {
    nb::gil_scoped_release release;
    planned_spmm<T>(kernels_of<T>(isa), plan, at<const T>(values), at<const T>(bias),
                    {at<const T>(x), x_feature_stride, x_batch_stride}, batch, at<T>(y), threads);
}

} // namespace

NB_MODULE(_native, m) {
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
    nb::class_<Plan>(m, "Plan").def_prop_ro("bytes", &Plan::bytes);
    m.def("make_plan", &make_plan);
#define OFFPATH_PRODUCTS(suffix, T)                                                                                    \
    m.def("spmm_" #suffix, &call_spmm<T>);                                                                             \
    m.def("sddmm_" #suffix, &call_sddmm<T>);                                                                           \
    m.def("planned_spmm_" #suffix, &call_planned_spmm<T>);
    OFFPATH_PRODUCTS(f32, float)
    OFFPATH_PRODUCTS(f64, double)
#undef OFFPATH_PRODUCTS
}
