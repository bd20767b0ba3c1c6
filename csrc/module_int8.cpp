// The Python face of the products with int8 values: tensors in, as in module_products.cpp.
#include "filled_products.h"
#include "int8_products.h"
#include "module.h"
#include "operand.h"

namespace nb = nanobind;
using namespace offpath;

namespace {

// y = product(kernels, weight, bias, x, batch, y) for what was made of a pattern with this many connections.
template <class Made, class Product>
bool int8_spmm(int64_t isa, const Made &made, int64_t nnz, const Operand &values, const Operand &scales,
               const Operand &x, const Operand &bias, const Operand &y, const Product &product) {
    return by_dtype(x, [&]<class T>() {
        const auto in = x.matrix<T>(made.columns);
        if (!(values.is_vector<int8_t>(nnz) && scales.is_vector<float>(made.rows) &&
              bias.is_vector_or_none<T>(made.rows) && in && y.has_room<T>(made.rows * in->batch)))
            return false;
        const Int8Values weight{values.data<const int8_t>(), scales.data<const float>()};
        const Kernels<T> &kernels = use_kernels<T>(isa, made);
        nb::gil_scoped_release release;
        product(kernels, weight, bias.data<const T>(), in->matrix, in->batch, y.data<T>());
        return true;
    });
}

bool call_bitmap_int8_spmm(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &scales,
                           const Operand &x, const Operand &bias, const Operand &y, int threads) {
    return int8_spmm(isa, bits, bits.nnz(), values, scales, x, bias, y,
                     [&](auto &kernels, auto &weight, auto *bias, auto &x, int64_t batch, auto *y) {
                         bitmap_int8_spmm(kernels, bits, weight, bias, x, batch, y, threads);
                     });
}

bool call_filled_int8_spmm(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &scales,
                           const Operand &x, const Operand &bias, const Operand &y, int threads) {
    return int8_spmm(isa, bits, bits.nnz(), values, scales, x, bias, y,
                     [&](auto &kernels, auto &weight, auto *bias, auto &x, int64_t batch, auto *y) {
                         filled_spmm(kernels, bits, {nullptr, weight}, bias, x, batch, y, false, threads);
                     });
}

bool call_int8_dots(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &scales, const Operand &x,
                    const Operand &bias, const Operand &y, int threads) {
    return int8_spmm(isa, bits, bits.nnz(), values, scales, x, bias, y,
                     [&](auto &kernels, auto &weight, auto *bias, auto &x, int64_t batch, auto *y) {
                         int8_dots(kernels, bits, weight, bias, x, batch, y, threads);
                     });
}

bool call_planned_int8_spmm(int64_t isa, const ProductPlan &plan, const Operand &values, const Operand &scales,
                            const Operand &x, const Operand &bias, const Operand &y, int threads) {
    return int8_spmm(isa, plan, plan.nnz, values, scales, x, bias, y,
                     [&](auto &kernels, auto &weight, auto *bias, auto &x, int64_t batch, auto *y) {
                         planned_int8_spmm(kernels, plan, weight, bias, x, batch, y, threads);
                     });
}

} // namespace

void offpath::bind_int8(nb::module_ &m) {
    const nb::arg given;
    const auto or_none = nb::arg().none();
    m.def("bitmap_int8_spmm", &call_bitmap_int8_spmm, given, given, given, given, given, or_none, given, given);
    m.def("filled_int8_spmm", &call_filled_int8_spmm, given, given, given, given, given, or_none, given, given);
    m.def("int8_dots", &call_int8_dots, given, given, given, given, given, or_none, given, given);
    m.def("planned_int8_spmm", &call_planned_int8_spmm, given, given, given, given, given, or_none, given, given);
}
