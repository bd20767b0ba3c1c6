// The products on AMX as the module calls them, for Python's ctypes: of bfloat16, with all else left out but what
// rounds tokens and scales sums, for any processor.
#include "backward.h"
#include "int8_dots-inl.h"
#include "int8_products.h"

using namespace offpath;

extern "C" const AmxKernels offpath_table_avx512amx;

namespace {

Kernels<bfloat16> kernels() {
    Kernels<bfloat16> only_amx = {};
    only_amx.layout = {.panel_width = 64,
                       .panel_entry_bytes = 2,
                       .value_bytes = 4,
                       .columns_per_step = 2,
                       .strip_width = 256,
                       .run_panels = 0};
    only_amx.amx = &offpath_table_avx512amx;
    only_amx.quantise_tokens = quantise_tokens<bfloat16>;
    only_amx.scale_sums = scale_sums<bfloat16>;
    return only_amx;
}

} // namespace

// x [batch, columns] and dy [batch, rows] by their strides of features and of tokens; `both` gets dx, dvalues and dbias
// of one call, one after the other.
extern "C" void run(const int32_t *crow_indices, const int32_t *col_indices, int64_t rows, int64_t columns,
                    const bfloat16 *values, const bfloat16 *bias, const bfloat16 *x, const int64_t *x_strides,
                    const bfloat16 *dy, const int64_t *dy_strides, int64_t batch, bool feature_major, int threads,
                    bfloat16 *y, bfloat16 *dx, bfloat16 *dvalues, bfloat16 *both) {
    find_pool();
    const auto only_amx = kernels();
    const BitMatrix bits({crow_indices, col_indices, rows}, columns, threads);
    const Matrix<bfloat16> in{x, x_strides[0], x_strides[1]}, out{dy, dy_strides[0], dy_strides[1]};
    filled_spmm(only_amx, bits, {values, {}}, bias, in, batch, y, feature_major, threads);
    filled_dx(only_amx, bits, values, out, batch, dx, threads);
    filled_dvalues(only_amx, bits, out, in, batch, dvalues, threads);
    bfloat16 *const dvalues_of_both = both + batch * columns, *const dbias = dvalues_of_both + bits.nnz();
    backward(only_amx, {nullptr, nullptr, &bits}, rows, columns, bits.nnz(), values, out, in, batch, both,
             feature_major, dvalues_of_both, dbias, threads);
}

// Product is 0 for activations as they are, 1 for those that are rounded.
extern "C" void run_int8(int product, const int32_t *crow_indices, const int32_t *col_indices, int64_t rows,
                         int64_t columns, const int8_t *values, const float *scales, const bfloat16 *bias,
                         const bfloat16 *x, const int64_t *x_strides, int64_t batch, int threads, bfloat16 *y) {
    find_pool();
    const BitMatrix bits({crow_indices, col_indices, rows}, columns, threads);
    const Matrix<bfloat16> in{x, x_strides[0], x_strides[1]};
    if (product == 0)
        filled_spmm(kernels(), bits, {nullptr, {values, scales}}, bias, in, batch, y, false, threads);
    else
        int8_dots(kernels(), bits, {values, scales}, bias, in, batch, y, threads);
}
