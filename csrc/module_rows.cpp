// The Python face of the kernels on sparse rows: tensors in, as in module_products.cpp. Here the contents of the index
// tensors that describe rows are looked at too: they come with every batch.
#include "dense_rows.h"
#include "encode.h"
#include "module.h"
#include "operand.h"
#include "row_products.h"
#include "sparse_row_products.h"

namespace nb = nanobind;
using namespace offpath;

namespace {

// product(rows), if these are so many rows that a kernel may follow in so many columns. The interpreter is let go.
template <class Product>
bool over_rows(const Operand &crow_indices, const Operand &indices, int64_t count, int64_t columns,
               const Product &product) {
    const auto rows = csr_of(crow_indices, indices);
    if (!(rows && rows->rows == count && rows_fit(*rows, indices.length(), columns)))
        return false;
    nb::gil_scoped_release release;
    product(*rows);
    return true;
}

bool call_count_indices(const Operand &indices, const Operand &counts) {
    const int64_t nnz = indices.length(), columns = counts.length();
    if (!(indices.is_vector<int32_t>(nnz) && counts.is_vector<int32_t>(columns)))
        return false;
    const int32_t pointer[] = {0, static_cast<int32_t>(nnz)};
    if (nnz > INT32_MAX || !rows_fit({pointer, indices.data<const int32_t>(), 1}, nnz, columns))
        return false;
    count_indices(indices.data<const int32_t>(), nnz, columns, counts.data<int32_t>());
    return true;
}

bool call_rows_matmul(int64_t isa, const Operand &crow_indices, const Operand &indices, const Operand &values,
                      const Operand &weight, const Operand &y, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto of_weight = weight.rows<const T>();
        const auto out = y.rows<T>();
        if (!(of_weight && out && out->width == of_weight->width && values.is_vector<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, out->count, of_weight->count, [&](const Csr &rows) {
            rows_matmul<T>(use_kernels<T>(isa), rows, values.data<const T>(), of_weight->rows, of_weight->width,
                           out->rows, false, threads);
        });
    });
}

bool call_rows_dots(int64_t isa, const Operand &crow_indices, const Operand &indices, const Operand &dy,
                    const Operand &weight, const Operand &dots, int threads) {
    return by_dtype(dots, [&]<class T>() {
        const auto of_y = dy.rows<const T>(), of_weight = weight.rows<const T>();
        if (!(of_y && of_weight && of_y->width == of_weight->width && dots.has_room<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, of_y->count, of_weight->count, [&](const Csr &rows) {
            rows_dots<T>(use_kernels<T>(isa), rows, of_y->rows, of_weight->rows, of_y->width, dots.data<T>(), threads);
        });
    });
}

bool call_rows_weight_gradient(int64_t isa, const Operand &crow_indices, const Operand &indices, const Operand &values,
                               const Operand &dy, const Operand &gradient, bool add, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto of_y = dy.rows<const T>();
        const auto out = gradient.rows<T>();
        if (!(of_y && out && of_y->width == out->width && values.is_vector<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, of_y->count, out->count, [&](const Csr &rows) {
            rows_weight_gradient<T>(use_kernels<T>(isa), rows, values.data<const T>(), of_y->rows, out->count,
                                    out->width, out->rows, add, threads);
        });
    });
}

bool call_rows_written_out(const Operand &crow_indices, const Operand &indices, const Operand &values,
                           const Operand &dense, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto out = dense.matrix<T>();
        if (!(out && dense.has_room<T>(out->batch * out->features) && values.is_vector<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, out->batch, out->features, [&](const Csr &rows) {
            rows_written_out<T>(rows, values.data<const T>(), out->features, dense.data<T>(), threads);
        });
    });
}

bool call_rows_picked(const Operand &crow_indices, const Operand &indices, const Operand &dense, const Operand &picked,
                      int threads) {
    return by_dtype(picked, [&]<class T>() {
        const auto in = dense.matrix<T>();
        if (!(in && dense.has_room<T>(in->batch * in->features) && picked.has_room<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, in->batch, in->features, [&](const Csr &rows) {
            rows_picked<T>(rows, dense.data<const T>(), in->features, picked.data<T>(), threads);
        });
    });
}

bool call_sparse_matmul(int64_t isa, const Operand &crow_indices, const Operand &indices, const Operand &values,
                        const Operand &w_crow_indices, const Operand &w_indices, const Operand &w_values,
                        const Operand &y, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto weight = csr_of(w_crow_indices, w_indices);
        const auto out = y.matrix<T>();
        if (!(weight && w_values.is_vector<T>(w_indices.length()) && values.is_vector<T>(indices.length()) && out &&
              y.has_room<T>(out->batch * out->features)))
            return false;
        return over_rows(crow_indices, indices, out->batch, weight->rows, [&](const Csr &rows) {
            sparse_matmul<T>(use_kernels<T>(isa), rows, values.data<const T>(), {*weight, w_values.data<const T>()},
                             out->features, y.data<T>(), threads);
        });
    });
}

bool call_sparse_dots(int64_t isa, const Operand &crow_indices, const Operand &indices, const Operand &dy,
                      const Operand &w_crow_indices, const Operand &w_indices, const Operand &w_values,
                      const Operand &dots, int threads) {
    return by_dtype(dots, [&]<class T>() {
        const auto weight = csr_of(w_crow_indices, w_indices);
        const auto of_y = dy.rows<const T>();
        if (!(weight && w_values.is_vector<T>(w_indices.length()) && of_y && dots.has_room<T>(indices.length())))
            return false;
        return over_rows(crow_indices, indices, of_y->count, weight->rows, [&](const Csr &rows) {
            sparse_dots<T>(use_kernels<T>(isa), rows, of_y->rows, {*weight, w_values.data<const T>()}, of_y->width,
                           dots.data<T>(), threads);
        });
    });
}

bool call_sparse_weight_gradient(int64_t isa, const Operand &crow_indices, const Operand &indices,
                                 const Operand &values, const Operand &dy, const Operand &w_crow_indices,
                                 const Operand &w_indices, const Operand &gradient, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto weight = csr_of(w_crow_indices, w_indices);
        const auto of_y = dy.rows<const T>();
        if (!(weight && values.is_vector<T>(indices.length()) && of_y && gradient.has_room<T>(w_indices.length())))
            return false;
        return over_rows(crow_indices, indices, of_y->count, weight->rows, [&](const Csr &rows) {
            sparse_weight_gradient<T>(use_kernels<T>(isa), rows, values.data<const T>(), of_y->rows, *weight,
                                      of_y->width, gradient.data<T>(), threads);
        });
    });
}

} // namespace

void offpath::bind_rows(nb::module_ &m) {
    m.def("count_indices", &call_count_indices);
    m.def("rows_matmul", &call_rows_matmul);
    m.def("rows_dots", &call_rows_dots);
    m.def("rows_weight_gradient", &call_rows_weight_gradient);
    m.def("rows_written_out", &call_rows_written_out);
    m.def("rows_picked", &call_rows_picked);
    m.def("sparse_matmul", &call_sparse_matmul);
    m.def("sparse_dots", &call_sparse_dots);
    m.def("sparse_weight_gradient", &call_sparse_weight_gradient);
}
