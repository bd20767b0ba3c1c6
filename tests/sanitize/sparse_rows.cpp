// The products of sparse rows with a sparse weight, on small integers: exact in every order of summation.
#include "sparse_rows.h"

#include "everywhere.h"
#include "sparse_row_products.h"

#include <random>

using namespace offpath;

namespace {

struct SparseRowSize {
    int64_t rows, inputs, outputs, k;
    double density;
};
// One of each, nothing at all, outputs that end inside a register, more rows than are summed at once, and few rows of
// so much work that each is summed in parts.
constexpr SparseRowSize sizes[] = {{1, 1, 1, 1, 1.0},        {5, 7, 3, 2, 0.5},     {0, 4, 3, 2, 0.5},
                                   {65, 100, 33, 10, 0.2},   {130, 60, 67, 7, 0.4}, {3, 50, 200, 50, 0.0},
                                   {2, 300, 1000, 200, 0.6}, {33, 64, 400, 0, 0.3}, {7, 9, 1, 9, 0.9}};

template <class T> struct SparseRowOperands {
    const SparseRowSize size;
    std::mt19937_64 generator{11};
    std::vector<int32_t> crow{0}, index, w_crow{0}, w_index;
    GuardedArray<T> values, w_values, dy;
    std::vector<Sum64> y, dots, gradient;

    explicit SparseRowOperands(const SparseRowSize &size)
        : size(size), values(patterns()), w_values(integers(w_index.size())), dy(integers(size.rows * size.outputs)),
          y(size.rows * size.outputs), dots(index.size()), gradient(w_index.size()) {
        for (int64_t r = 0; r < size.rows; ++r)
            for (int64_t s = crow[r]; s < crow[r + 1]; ++s)
                for (int64_t c = w_crow[index[s]]; c < w_crow[index[s] + 1]; ++c) {
                    const int64_t place = r * size.outputs + w_index[c];
                    y[place].add(to_double(values[s]) * to_double(w_values[c]));
                    dots[s].add(to_double(dy[place]) * to_double(w_values[c]));
                    gradient[c].add(to_double(values[s]) * to_double(dy[place]));
                }
    }

  private:
    GuardedArray<T> integers(int64_t count) {
        std::uniform_int_distribution<int> integer(-3, 3);
        std::vector<T> entries(count);
        for (T &entry : entries)
            entry = round_to<T>(integer(generator));
        return GuardedArray<T>::read_only(entries);
    }

    // Draws both patterns, and the values of the rows.
    GuardedArray<T> patterns() {
        std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(size.inputs - 1));
        std::bernoulli_distribution connected(size.density);
        for (int64_t r = 0; r < size.rows; ++r) {
            for (int64_t i = 0; i < size.k; ++i)
                index.push_back(any(generator));
            crow.push_back(static_cast<int32_t>(index.size()));
        }
        for (int64_t i = 0; i < size.inputs; ++i) {
            for (int64_t o = 0; o < size.outputs; ++o)
                if (connected(generator))
                    w_index.push_back(static_cast<int32_t>(o));
            w_crow.push_back(static_cast<int32_t>(w_index.size()));
        }
        return integers(index.size());
    }
};

template <class T> void check_sparse_rows(const SparseRowSize &size) {
    SparseRowOperands<T> o(size);
    const auto crow = GuardedArray<int32_t>::read_only(o.crow), index = GuardedArray<int32_t>::read_only(o.index);
    const auto w_crow = GuardedArray<int32_t>::read_only(o.w_crow),
               w_index = GuardedArray<int32_t>::read_only(o.w_index);
    const Csr rows{crow.data(), index.data(), size.rows}, connections{w_crow.data(), w_index.data(), size.inputs};
    const SparseWeight<T> weight{connections, o.w_values.data()};
    const Rows<const T> dy{o.dy.data(), size.outputs};
    const std::string what = std::to_string(size.rows) + " rows of " + std::to_string(size.inputs);
    run_everywhere<T>(what, [&](const Kernels<T> &kernels, int threads, const std::string &where) {
        const GuardedArray<T> y(o.y.size()), dots(o.dots.size()), gradient(o.gradient.size());
        sparse_matmul<T>(kernels, rows, o.values.data(), weight, size.outputs, y.data(), threads);
        check("sparse_matmul, " + where, y, o.y, true);
        sparse_dots<T>(kernels, rows, dy, weight, size.outputs, dots.data(), threads);
        check("sparse_dots, " + where, dots, o.dots, true);
        sparse_weight_gradient<T>(kernels, rows, o.values.data(), dy, connections, size.outputs, gradient.data(),
                                  threads);
        check("sparse_weight_gradient, " + where, gradient, o.gradient, true);
    });
}

} // namespace

void check_all_sparse_rows() {
    for (const SparseRowSize &size : sizes) {
        check_sparse_rows<float>(size);
        check_sparse_rows<double>(size);
        check_sparse_rows<bfloat16>(size);
    }
    std::cout << "sparse rows and sparse weights: every result is right" << std::endl;
}
