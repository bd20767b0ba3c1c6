#include "int8.h"
#include "everywhere.h"
#include "filled_products.h"
#include "int8_products.h"
#include "operands.h"

using namespace offpath;

namespace {

// Whole numbers, and 127 as every token's first feature: rounding the token to int8 then changes nothing, and all
// products give the same.
template <class T> struct Int8Operands {
    const Pattern pattern;
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<T> bias, x;
    std::vector<Sum64> y, y_with_bias;

    explicit Int8Operands(const Problem &problem)
        : pattern(make_pattern(problem.rows, problem.columns, problem.connected)) {
        std::mt19937_64 generator(2);
        std::uniform_int_distribution<int> byte(-128, 127);
        values.resize(pattern.nnz());
        for (int8_t &value : values)
            value = static_cast<int8_t>(byte(generator));
        scales = drawn<float>(pattern.rows, Draw::small_integers, generator);
        bias = drawn<T>(pattern.rows, Draw::small_integers, generator);
        x = drawn<T>(problem.batch * pattern.columns, Draw::small_integers, generator);
        for (int64_t b = 0; b < problem.batch && pattern.columns > 0; ++b)
            x[b * pattern.columns] = round_to<T>(127);
        y.resize(problem.batch * pattern.rows);
        for (int64_t b = 0; b < problem.batch; ++b)
            for (int64_t r = 0; r < pattern.rows; ++r)
                for (int32_t s = pattern.crow_indices[r]; s < pattern.crow_indices[r + 1]; ++s)
                    y[b * pattern.rows + r].add(static_cast<double>(scales[r]) * values[s] *
                                                to_double(x[b * pattern.columns + pattern.col_indices[s]]));
        y_with_bias = y;
        for (size_t i = 0; i < y.size(); ++i)
            y_with_bias[i].add(to_double(bias[i % pattern.rows]));
    }
};

template <class T> void check_int8(const Problem &problem) {
    const Int8Operands<T> o(problem);
    const auto values = GuardedArray<int8_t>::read_only(o.values);
    const auto scales = GuardedArray<float>::read_only(o.scales);
    const auto bias = GuardedArray<T>::read_only(o.bias);
    const Int8Values weight{values.data(), scales.data()};
    for (const Storage &storage : storages) {
        const Activations<T> stored(o.x, o.pattern.columns, problem.batch, storage);
        const Matrix<T> x = stored.matrix();
        const T *b = storage.bias ? bias.data() : nullptr;
        const std::vector<Sum64> &expected = storage.bias ? o.y_with_bias : o.y;
        run_everywhere<T>(
            problem.name + ", " + storage.name, [&](const Kernels<T> &kernels, int threads, const std::string &where) {
                const BitMatrix bits(o.pattern.csr(), o.pattern.columns, threads);
                const ProductPlan plan(o.pattern.csr(), o.pattern.columns, nullptr, kernels.layout, threads);
                const GuardedArray<T> few(expected.size()), many(expected.size()), dots(expected.size()),
                    filled(expected.size());
                bitmap_int8_spmm<T>(kernels, bits, weight, b, x, problem.batch, few.data(), threads);
                check("bitmap_int8_spmm, " + where, few, expected, true);
                planned_int8_spmm<T>(kernels, plan, weight, b, x, problem.batch, many.data(), threads);
                check("planned_int8_spmm, " + where, many, expected, true);
                filled_spmm<T>(kernels, bits, {nullptr, weight}, b, x, problem.batch, filled.data(), false, threads);
                check("filled_int8_spmm, " + where, filled, expected, true);
                int8_dots<T>(kernels, bits, weight, b, x, problem.batch, dots.data(), threads);
                check("int8_dots, " + where, dots, expected, true);
            });
    }
}

} // namespace

void check_all_int8() {
    const std::vector<Problem> all = problems();
    for (size_t i = 0; i < all.size(); ++i) { // each problem in one dtype
        if (i % 3 == 0)
            check_int8<float>(all[i]);
        else if (i % 3 == 1)
            check_int8<double>(all[i]);
        else
            check_int8<bfloat16>(all[i]);
    }
    std::cout << "int8 values: every result is right" << std::endl;
}
