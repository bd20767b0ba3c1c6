// The Python face of the kernels, and the only file that knows Python. It takes raw addresses: kernels/cpu.py is
// its only caller and has checked device, dtype, shape, strides and the pattern before.
#include "digest.h"
#include "isa.h"
#include "parallel.h"
#include "transpose.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
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

// A [features, batch] matrix as torch hands it over: any strides, one of which is 1.
template <class T> struct Matrix {
    T *data;
    int64_t feature_stride, batch_stride;
};

// The feature-major form of a matrix: itself, or a packed copy when its features are what lies side by side.
template <class T> class FeatureMajor {
  public:
    FeatureMajor(const Matrix<const T> &matrix, int64_t features, int64_t batch, int threads)
        : data(matrix.data), stride(matrix.feature_stride) {
        if (matrix.batch_stride == 1 || batch == 1)
            return;
        copy = std::make_unique_for_overwrite<T[]>(features * batch);
        transpose(matrix.data, matrix.batch_stride, copy.get(), batch, batch, features, threads);
        data = copy.get();
        stride = batch;
    }
    const T *data;
    int64_t stride;

  private:
    std::unique_ptr<T[]> copy;
};

template <class Args>
void run(int64_t isa, void (*KernelTable::*kernel)(const Args &, const Block &), const Args &args,
         int64_t batch_quantum, int threads) {
    struct Call {
        void (*kernel)(const Args &, const Block &);
        const Args &args;
        const Blocks blocks;
    } call{use_table(isa).*kernel, args, Blocks(args.csr, args.batch, batch_quantum, threads)};
    const auto run_block = [](const void *data, int64_t i) {
        const Call &c = *static_cast<const Call *>(data);
        c.kernel(c.args, c.blocks[i]);
    };
    parallel_for(call.blocks.count(), threads, run_block, &call);
}

// x is [columns, batch] with the strides given; y is written token-major: [batch, rows], contiguous.
template <class T, auto kernel>
void spmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
          Address values, Address bias, Address x, int64_t x_feature_stride, int64_t x_batch_stride, Address y,
          int threads) {
    nb::gil_scoped_release release;
    const FeatureMajor<T> packed({at<const T>(x), x_feature_stride, x_batch_stride}, columns, batch, threads);
    const auto result = std::make_unique_for_overwrite<T[]>(rows * batch);
    // A strip that keeps eight of the widest registers busy; splitting the batch there leaves no tails inside.
    constexpr int64_t batch_quantum = 8 * 64 / sizeof(T);
    run(isa, kernel,
        spmm_args<T>{csr_at(crow_indices, col_indices, rows), at<const T>(values), at<const T>(bias), packed.data,
                     packed.stride, result.get(), batch, batch},
        batch_quantum, threads);
    transpose(result.get(), batch, at<T>(y), rows, rows, batch, threads);
}

template <class T, auto kernel>
void sddmm(int64_t isa, int64_t rows, int64_t columns, int64_t batch, Address crow_indices, Address col_indices,
           Address dy, int64_t dy_feature_stride, int64_t dy_batch_stride, Address x, int64_t x_feature_stride,
           int64_t x_batch_stride, Address dvalues, int threads) {
    nb::gil_scoped_release release;
    const FeatureMajor<T> packed_dy({at<const T>(dy), dy_feature_stride, dy_batch_stride}, rows, batch, threads);
    const FeatureMajor<T> packed_x({at<const T>(x), x_feature_stride, x_batch_stride}, columns, batch, threads);
    // The batch is not split: a connection's sum must not depend on the number of threads.
    constexpr int64_t batch_quantum = 0;
    run(isa, kernel,
        sddmm_args<T>{csr_at(crow_indices, col_indices, rows), packed_dy.data, packed_dy.stride, packed_x.data,
                      packed_x.stride, at<T>(dvalues), batch},
        batch_quantum, threads);
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
    m.def("digest", [](int64_t rows, int64_t nnz, Address crow_indices, Address col_indices) {
        const uint64_t first = digest(at<const int32_t>(crow_indices), rows + 1, 0);
        return digest(at<const int32_t>(col_indices), nnz, first);
    });
#define OFFPATH_KERNEL(op, suffix, T) m.def(#op "_" #suffix, &op<T, &KernelTable::op##_##suffix>);
#include "kernels.def"
#undef OFFPATH_KERNEL
}
