// What the files of bindings share; nothing else knows Python.
#pragma once

#include "isa.h"
#include "products.h"

#include <nanobind/nanobind.h>

#include <stdexcept>

namespace offpath {

// The kernels for T in the variant `isa`, counted as one call of it.
template <class T> const Kernels<T> &use_kernels(int64_t isa) { return kernels_of<T>(use_table(isa)); }

// The same for what was made of a pattern; a plan has to be made for these kernels.
template <class T, class Made> const Kernels<T> &use_kernels(int64_t isa, const Made &made) {
    const Kernels<T> &kernels = use_kernels<T>(isa);
    if constexpr (requires { made.fits(kernels.layout); })
        if (!made.fits(kernels.layout))
            throw std::invalid_argument("the plan was made for another dtype or ISA");
    return kernels;
}

// The products of layers.
void bind_products(nanobind::module_ &m);

// The products on sparse rows, and what selects their entries.
void bind_rows(nanobind::module_ &m);
void bind_selections(nanobind::module_ &m);

void bind_convolutions(nanobind::module_ &m);

// The products with int8 values.
void bind_int8(nanobind::module_ &m);

} // namespace offpath
