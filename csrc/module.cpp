// The Python face of what is made of a pattern. This file, module_*.cpp and operand.* are the only ones that know
// Python.
#include "module.h"
#include "bitmap.h"
#include "digest.h"
#include "operand.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
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

// What is made is None for operands that do not fit.
template <class T>
std::unique_ptr<ProductPlan> make_plan(int64_t isa, const Operand &crow_indices, const Operand &col_indices,
                                       int64_t columns, const Operand &permutation, int threads) {
    const auto csr = csr_of(crow_indices, col_indices);
    if (!(csr && permutation.is_vector_or_none<int32_t>(col_indices.length())))
        return nullptr;
    const Layout &layout = kernels_of<T>(*isas()[isa].table).layout;
    nb::gil_scoped_release release;
    return std::make_unique<ProductPlan>(*csr, columns, permutation.data<const int32_t>(), layout, threads);
}

template <class Made>
std::unique_ptr<Made> make(const Operand &crow_indices, const Operand &col_indices, int64_t columns, int threads) {
    const auto csr = csr_of(crow_indices, col_indices);
    if (!csr)
        return nullptr;
    nb::gil_scoped_release release;
    return std::make_unique<Made>(*csr, columns, threads);
}

// None for what are no vectors; whether they belong together is asked later, of those that are new.
std::optional<uint64_t> digest_of(const Operand &crow_indices, const Operand &col_indices) {
    const int64_t pointers = crow_indices.length(), nnz = col_indices.length();
    if (!(crow_indices.is_vector<int32_t>(pointers) && col_indices.is_vector<int32_t>(nnz)))
        return {};
    return digest(col_indices.data<const int32_t>(), nnz, digest(crow_indices.data<const int32_t>(), pointers, 0));
}

// col_indices = the columns that the bits were made of.
bool write_columns(const BitMatrix &bits, const Operand &col_indices, int threads) {
    if (!col_indices.is_vector<int32_t>(bits.nnz()))
        return false;
    nb::gil_scoped_release release;
    bits.write_columns(col_indices.data<int32_t>(), threads);
    return true;
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
    const nb::arg given;
    const auto or_none = nb::arg().none();
    nb::set_leak_warnings(false); // DistributedDataParallel keeps its model alive until the process has ended
    find_pool();
    describe_by(nb::module_::import_("torch").attr("Tensor"));
    m.def("isas", [] {
        std::vector<std::pair<std::string, bool>> result;
        for (const Isa &isa : isas())
            result.emplace_back(isa.table->isa, isa.runs_here);
        return result;
    });
    m.def("calls", &calls);
    m.def("pool_library", &pool_library);
    m.def("kept_scratch_bytes", &kept_scratch_bytes);
    m.def("digest", &digest_of);
    bind_products(m);
    bind_rows(m);
    bind_selections(m);
    bind_int8(m);
    bind_convolutions(m);
    nb::class_<ProductPlan>(m, "Plan").def_prop_ro("bytes", &ProductPlan::bytes);
    nb::class_<Tiles>(m, "Tiles").def_prop_ro("bytes", &Tiles::bytes);
    m.def("make_tiles", &make<Tiles>);
    nb::class_<BitMatrix>(m, "Bitmap").def_prop_ro("bytes", &BitMatrix::bytes);
    m.def("make_bitmap", &make<BitMatrix>);
    m.def("write_columns", &write_columns);
#define OFFPATH_PRODUCTS(suffix, T)                                                                                    \
    m.def("make_plan_" #suffix, &make_plan<T>, given, given, given, given, or_none, given);                            \
    m.def("take_output_" #suffix, &take_output<T>);
    OFFPATH_PRODUCTS(f32, float)
    OFFPATH_PRODUCTS(f64, double)
    OFFPATH_PRODUCTS(bf16, bfloat16)
#undef OFFPATH_PRODUCTS
}
