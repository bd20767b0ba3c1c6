// The Python face of the selections: tensors in, as in module_products.cpp.
#include "encode.h"
#include "module.h"
#include "operand.h"

#include <nanobind/stl/optional.h>

namespace nb = nanobind;
using namespace offpath;

namespace {

// Scores whose columns int32 can name.
template <class T> std::optional<DenseRows<const T>> scores_of(const Operand &x) {
    const auto found = x.rows<const T>();
    return found && found->width <= INT32_MAX ? found : std::nullopt;
}

bool call_topk(int64_t isa, const Operand &x, int64_t k, const Operand &values, const Operand &indices, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto scores = scores_of<T>(x);
        if (!(scores && k >= 0 && k <= scores->width && values.has_room<T>(scores->count * k) &&
              indices.has_room<int32_t>(scores->count * k)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        topk<T>(kernels, scores->rows, scores->count, scores->width, k, values.data<T>(), indices.data<int32_t>(),
                threads);
        return true;
    });
}

bool call_batch_topk(int64_t isa, const Operand &x, int64_t k, const Operand &crow_indices, const Operand &indices,
                     const Operand &values, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto scores = scores_of<T>(x);
        if (!(scores && k >= 0 && k <= x.entries() && crow_indices.is_vector<int32_t>(scores->count + 1) &&
              indices.is_vector<int32_t>(k) && values.is_vector<T>(k)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        batch_topk<T>(kernels, scores->rows, scores->count, scores->width, k, crow_indices.data<int32_t>(),
                      indices.data<int32_t>(), values.data<T>(), threads);
        return true;
    });
}

// How many entries are above, of which row i's begin at crow_indices[i]; None for operands that do not fit.
std::optional<int64_t> call_count_above(int64_t isa, const Operand &x, const Operand &thresholds,
                                        const Operand &crow_indices, int threads) {
    std::optional<int64_t> nnz;
    by_dtype(x, [&]<class T>() {
        const auto scores = scores_of<T>(x);
        if (!(scores && thresholds.is_vector_or_none<T>(scores->width) &&
              crow_indices.is_vector<int32_t>(scores->count + 1)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        nnz = count_above<T>(kernels, scores->rows, scores->count, scores->width, thresholds.data<const T>(),
                             crow_indices.data<int32_t>(), threads);
        return true;
    });
    return nnz;
}

// Takes what was counted, with what count_above has written into crow_indices.
bool call_take_above(int64_t isa, const Operand &x, const Operand &thresholds, const Operand &crow_indices,
                     const Operand &indices, const Operand &values, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto scores = scores_of<T>(x);
        const int64_t nnz = indices.length();
        if (!(scores && thresholds.is_vector_or_none<T>(scores->width) &&
              crow_indices.is_vector<int32_t>(scores->count + 1) && indices.is_vector<int32_t>(nnz) &&
              values.is_vector<T>(nnz)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        take_above<T>(kernels, scores->rows, scores->count, scores->width, thresholds.data<const T>(),
                      crow_indices.data<const int32_t>(), indices.data<int32_t>(), values.data<T>(), threads);
        return true;
    });
}

bool call_encode_topk(int64_t isa, const Operand &x, const Operand &weight, const Operand &bias, int64_t k,
                      const Operand &values, const Operand &indices, int threads) {
    return by_dtype(values, [&]<class T>() {
        const auto in = x.matrix<T>();
        const auto latents = weight.rows<const T>();
        if (!(in && latents && latents->width == in->features && bias.is_vector_or_none<T>(latents->count) && k >= 0 &&
              k <= latents->count && values.has_room<T>(in->batch * k) && indices.has_room<int32_t>(in->batch * k)))
            return false;
        const Kernels<T> &kernels = use_kernels<T>(isa);
        nb::gil_scoped_release release;
        encode_topk<T>(kernels, in->matrix, in->batch, in->features, latents->rows, latents->count,
                       bias.data<const T>(), k, values.data<T>(), indices.data<int32_t>(), threads);
        return true;
    });
}

} // namespace

void offpath::bind_selections(nb::module_ &m) {
    const nb::arg given;
    const auto or_none = nb::arg().none();
    m.def("topk", &call_topk);
    m.def("batch_topk", &call_batch_topk);
    m.def("count_above", &call_count_above, given, given, or_none, given, given);
    m.def("take_above", &call_take_above, given, given, or_none, given, given, given, given);
    m.def("encode_topk", &call_encode_topk, given, given, given, or_none, given, given, given, given);
}
