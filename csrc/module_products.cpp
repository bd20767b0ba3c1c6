// The Python face of a layer's products. They take tensors, and say false to those that do not fit: what is wrong with
// them is for kernels/operands.py to tell, and results are memory that kernels/variant*.py have taken. The contents of
// index tensors are theirs to check.
#include "backward.h"
#include "bitmap_backward.h"
#include "module.h"
#include "operand.h"

namespace nb = nanobind;
using namespace offpath;

namespace {

bool call_spmm(int64_t isa, const Operand &crow_indices, const Operand &col_indices, const Operand &values,
               const Operand &x, const Operand &bias, const Operand &y, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto csr = csr_of(crow_indices, col_indices);
        const auto in = x.tokens<T>();
        if (!(csr && values.is_vector<T>(col_indices.length()) && bias.is_vector_or_none<T>(csr->rows) && in &&
              y.has_room<T>(csr->rows * in->batch)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        spmm<T>(kernels, *csr, in->features, values.data<const T>(), bias.data<const T>(), in->matrix, in->batch,
                y.data<T>(), threads);
        return true;
    });
}

bool call_sddmm(int64_t isa, const Operand &crow_indices, const Operand &col_indices, const Operand &dy,
                const Operand &x, const Operand &dvalues, int threads) {
    return by_dtype(dvalues, [&]<class T>() {
        const auto csr = csr_of(crow_indices, col_indices);
        const auto out = dy.matrix<T>(), in = x.matrix<T>();
        if (!(csr && out && in && out->features == csr->rows && in->batch == out->batch &&
              dvalues.has_room<T>(col_indices.length())))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        sddmm<T>(kernels, *csr, in->features, out->matrix, in->matrix, in->batch, dvalues.data<T>(), threads);
        return true;
    });
}

// y = product(kernels, values, bias, x, batch, y) for what was made of a pattern with this many connections.
template <class Made, class Product>
bool prepared_spmm(int64_t isa, const Made &made, int64_t nnz, const Operand &values, const Operand &x,
                   const Operand &bias, const Operand &y, const Product &product) {
    return by_dtype(values, [&]<class T>() {
        const auto in = x.tokens<T>(made.columns);
        if (!(values.is_vector<T>(nnz) && bias.is_vector_or_none<T>(made.rows) && in &&
              y.has_room<T>(made.rows * in->batch)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, made);
        nb::gil_scoped_release release;
        product(kernels, values.data<const T>(), bias.data<const T>(), in->matrix, in->batch, y.data<T>());
        return true;
    });
}

bool call_planned_spmm(int64_t isa, const ProductPlan &plan, const Operand &values, const Operand &x,
                       const Operand &bias, const Operand &y, bool feature_major, int threads) {
    return prepared_spmm(isa, plan, plan.nnz, values, x, bias, y,
                         [&](auto &kernels, auto *values, auto *bias, auto &x, int64_t batch, auto *y) {
                             planned_spmm(kernels, plan, values, bias, x, batch, y, feature_major, threads);
                         });
}

bool call_filled_spmm(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &x, const Operand &bias,
                      const Operand &y, bool feature_major, int threads) {
    return prepared_spmm(isa, bits, bits.nnz(), values, x, bias, y,
                         [&](auto &kernels, auto *values, auto *bias, auto &x, int64_t batch, auto *y) {
                             filled_spmm(kernels, bits, {values, {}}, bias, x, batch, y, feature_major, threads);
                         });
}

bool call_bitmap_spmm(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &x, const Operand &bias,
                      const Operand &y, int threads) {
    return prepared_spmm(isa, bits, bits.nnz(), values, x, bias, y,
                         [&](auto &kernels, auto *values, auto *bias, auto &x, int64_t batch, auto *y) {
                             bitmap_spmm(kernels, bits, values, bias, x, batch, y, threads);
                         });
}

// dx = product(kernels, values, dy, batch, dx) for the bits of a weight.
template <class Product>
bool dx_over_bits(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &dy, const Operand &dx,
                  const Product &product) {
    return by_dtype(values, [&]<class T>() {
        const auto out = dy.matrix<T>(bits.rows);
        if (!(values.is_vector<T>(bits.nnz()) && out && dx.has_room<T>(bits.columns * out->batch)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, bits);
        nb::gil_scoped_release release;
        product(kernels, values.data<const T>(), out->matrix, out->batch, dx.data<T>());
        return true;
    });
}

bool call_bitmap_dx(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &dy, const Operand &dx,
                    int threads) {
    return dx_over_bits(isa, bits, values, dy, dx, [&](auto &kernels, auto *values, auto &dy, int64_t batch, auto *dx) {
        bitmap_dx(kernels, bits, values, dy, batch, dx, threads);
    });
}

bool call_filled_dx(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &dy, const Operand &dx,
                    int threads) {
    return dx_over_bits(isa, bits, values, dy, dx, [&](auto &kernels, auto *values, auto &dy, int64_t batch, auto *dx) {
        filled_dx(kernels, bits, values, dy, batch, dx, threads);
    });
}

// dvalues = product(kernels, dy, x, batch, dvalues) for what was made of a pattern.
template <class Made, class Product>
bool prepared_sddmm(int64_t isa, const Made &made, const Operand &dy, const Operand &x, const Operand &dvalues,
                    const Product &product) {
    return by_dtype(dvalues, [&]<class T>() {
        const auto out = dy.matrix<T>(made.rows), in = x.matrix<T>(made.columns);
        if (!(out && in && in->batch == out->batch && dvalues.has_room<T>(made.nnz())))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, made);
        nb::gil_scoped_release release;
        product(kernels, out->matrix, in->matrix, in->batch, dvalues.data<T>());
        return true;
    });
}

bool call_tiled_sddmm(int64_t isa, const Tiles &tiles, const Operand &dy, const Operand &x, const Operand &dvalues,
                      int threads) {
    return prepared_sddmm(isa, tiles, dy, x, dvalues,
                          [&](auto &kernels, auto &dy, auto &x, int64_t batch, auto *dvalues) {
                              tiled_sddmm(kernels, tiles, dy, x, batch, dvalues, threads);
                          });
}

bool call_bitmap_dvalues(int64_t isa, const BitMatrix &bits, const Operand &dy, const Operand &x,
                         const Operand &dvalues, int threads) {
    return prepared_sddmm(isa, bits, dy, x, dvalues,
                          [&](auto &kernels, auto &dy, auto &x, int64_t batch, auto *dvalues) {
                              bitmap_dvalues(kernels, bits, dy, x, batch, dvalues, threads);
                          });
}

bool call_filled_dvalues(int64_t isa, const BitMatrix &bits, const Operand &dy, const Operand &x,
                         const Operand &dvalues, int threads) {
    return prepared_sddmm(isa, bits, dy, x, dvalues,
                          [&](auto &kernels, auto &dy, auto &x, int64_t batch, auto *dvalues) {
                              filled_dvalues(kernels, bits, dy, x, batch, dvalues, threads);
                          });
}

struct Sizes {
    int64_t rows, columns, nnz;

    bool operator==(const Sizes &) const = default;
};

template <class Made> Sizes sizes_of(const Made &made) { return {made.rows, made.columns, made.nnz()}; }

// All gradients = product(kernels, values, dy, x, batch, dx, dvalues, dbias) for a weight of these sizes.
template <class Made, class Product>
bool all_gradients(int64_t isa, const Made &made, const Sizes &of, const Operand &values, const Operand &dy,
                   const Operand &x, const Operand &dx, const Operand &dvalues, const Operand &dbias,
                   const Product &product) {
    return by_dtype(values, [&]<class T>() {
        const auto out = dy.matrix<T>(of.rows), in = x.matrix<T>(of.columns);
        if (!(values.is_vector<T>(of.nnz) && out && in && in->batch == out->batch &&
              dx.has_room<T>(of.columns * in->batch) && dvalues.has_room<T>(of.nnz) && dbias.has_room<T>(of.rows)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa, made);
        nb::gil_scoped_release release;
        product(kernels, values.data<const T>(), out->matrix, in->matrix, in->batch, dx.data<T>(), dvalues.data<T>(),
                dbias.data<T>());
        return true;
    });
}

// Over a transposed plan, tiles and bits: what the gradients are to go over, and None for the rest.
bool call_backward(int64_t isa, const ProductPlan *transpose, const Tiles *tiles, const BitMatrix *bits,
                   const Operand &values, const Operand &dy, const Operand &x, const Operand &dx, bool feature_major,
                   const Operand &dvalues, const Operand &dbias, int threads) {
    if (!(tiles || bits) || !(transpose || bits))
        throw std::invalid_argument("expected tiles or bits for dvalues, and a transposed plan or bits for dx");
    const Sizes of = tiles ? sizes_of(*tiles) : sizes_of(*bits);
    if ((transpose && Sizes{transpose->columns, transpose->rows, transpose->nnz} != of) ||
        (bits && sizes_of(*bits) != of))
        return false;
    const Ways ways = {transpose, tiles, bits};
    return all_gradients(
        isa, ways, of, values, dy, x, dx, dvalues, dbias,
        [&](auto &kernels, auto *values, auto &dy, auto &x, int64_t batch, auto *dx, auto *dvalues, auto *dbias) {
            backward(kernels, ways, of.rows, of.columns, of.nnz, values, dy, x, batch, dx, feature_major, dvalues,
                     dbias, threads);
        });
}

bool call_bitmap_backward(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &dy,
                          const Operand &x, bool fills_dx, bool fills_dvalues, const Operand &dx,
                          const Operand &dvalues, const Operand &dbias, int threads) {
    return all_gradients(
        isa, bits, sizes_of(bits), values, dy, x, dx, dvalues, dbias,
        [&](auto &kernels, auto *values, auto &dy, auto &x, int64_t batch, auto *dx, auto *dvalues, auto *dbias) {
            bitmap_backward(kernels, bits, values, dy, x, batch, fills_dx, fills_dvalues, dx, dvalues, dbias, threads);
        });
}

bool call_expand(int64_t isa, const BitMatrix &bits, const Operand &values, const Operand &dense, int threads) {
    return by_dtype(values, [&]<class T>() {
        if (!(values.is_vector<T>(bits.nnz()) && dense.has_room<T>(bits.rows * bits.columns)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        expand<T>(kernels, bits, values.data<const T>(), dense.data<T>(), threads);
        return true;
    });
}

bool call_compress(int64_t isa, const BitMatrix &bits, const Operand &dense, const Operand &values, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto weight = dense.matrix<T>(bits.columns);
        if (!(weight && weight->batch == bits.rows && dense.has_room<T>(bits.rows * bits.columns) &&
              values.has_room<T>(bits.nnz())))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        compress<T>(kernels, bits, dense.data<const T>(), values.data<T>(), threads);
        return true;
    });
}

} // namespace

void offpath::bind_products(nb::module_ &m) {
    const nb::arg given;
    const auto or_none = nb::arg().none();
    m.def("spmm", &call_spmm, given, given, given, given, given, or_none, given, given);
    m.def("sddmm", &call_sddmm);
    m.def("planned_spmm", &call_planned_spmm, given, given, given, given, or_none, given, given, given);
    m.def("filled_spmm", &call_filled_spmm, given, given, given, given, or_none, given, given, given);
    m.def("bitmap_spmm", &call_bitmap_spmm, given, given, given, given, or_none, given, given);
    m.def("bitmap_dx", &call_bitmap_dx);
    m.def("filled_dx", &call_filled_dx);
    m.def("tiled_sddmm", &call_tiled_sddmm);
    m.def("bitmap_dvalues", &call_bitmap_dvalues);
    m.def("filled_dvalues", &call_filled_dvalues);
    m.def("backward", &call_backward, given, or_none, or_none, or_none, given, given, given, given, given, given, given,
          given);
    m.def("bitmap_backward", &call_bitmap_backward);
    m.def("expand", &call_expand);
    m.def("compress", &call_compress);
}
