// Every product and selection on sparse rows, on small integers: exact in every order of summation.
#include "rows.h"

#include "dense_rows.h"
#include "encode.h"
#include "everywhere.h"
#include "row_products.h"

#include <algorithm>
#include <numeric>
#include <random>

using namespace offpath;

namespace {

struct RowSize {
    int64_t rows, columns, width, k;
};
// One of each, tails of every register, several panels of tokens and parts of the weight, lists that overflow, rows
// long enough for maxima of buckets.
constexpr RowSize sizes[] = {{1, 1, 1, 1},      {5, 7, 3, 2},       {0, 4, 3, 2},     {65, 100, 33, 10},
                             {130, 300, 67, 7}, {3, 50, 200, 50},   {9, 4096, 5, 32}, {40, 1700, 17, 3},
                             {33, 64, 400, 0},  {17, 2000, 16, 400}};

template <class T> GuardedArray<T> integers(int64_t count, std::mt19937_64 &generator) {
    std::uniform_int_distribution<int> integer(-3, 3);
    std::vector<T> entries(count);
    for (T &entry : entries)
        entry = round_to<T>(integer(generator));
    return GuardedArray<T>::read_only(entries);
}

template <class T> struct RowOperands {
    const RowSize size;
    std::mt19937_64 generator{7};
    GuardedArray<T> values, weight, dy, bias, scores;
    std::vector<int32_t> crow, index;
    std::vector<Sum64> y, dots, gradient, added, encoded, dense, picked;

    explicit RowOperands(const RowSize &size)
        : size(size), values(integers<T>(size.rows * size.k, generator)),
          weight(integers<T>(size.columns * size.width, generator)), dy(integers<T>(size.rows * size.width, generator)),
          bias(integers<T>(size.columns, generator)), scores(integers<T>(size.rows * size.columns, generator)),
          crow(size.rows + 1), index(size.rows * size.k), y(size.rows * size.width), dots(size.rows * size.k),
          gradient(size.columns * size.width), added(gradient), encoded(size.rows * size.columns),
          dense(size.rows * size.columns), picked(size.rows * size.k) {
        std::uniform_int_distribution<int32_t> any(0, static_cast<int32_t>(size.columns - 1));
        for (int64_t r = 0; r <= size.rows; ++r)
            crow[r] = static_cast<int32_t>(r * size.k);
        for (int32_t &i : index)
            i = any(generator);
        for (int64_t r = 0; r < size.rows; ++r)
            for (int64_t s = crow[r]; s < crow[r + 1]; ++s) {
                dense[r * size.columns + index[s]].add(to_double(values[s]));
                picked[s].add(to_double(scores[r * size.columns + index[s]]));
                for (int64_t c = 0; c < size.width; ++c) {
                    y[r * size.width + c].add(to_double(values[s]) * to_double(weight[index[s] * size.width + c]));
                    dots[s].add(to_double(dy[r * size.width + c]) * to_double(weight[index[s] * size.width + c]));
                    gradient[index[s] * size.width + c].add(to_double(values[s]) * to_double(dy[r * size.width + c]));
                }
            }
        added = gradient;
        for (int64_t i = 0; i < size.columns * size.width; ++i)
            added[i].add(to_double(weight[i]));
        for (int64_t r = 0; r < size.rows; ++r)
            for (int64_t n = 0; n < size.columns; ++n) {
                encoded[r * size.columns + n].add(to_double(bias[n]));
                for (int64_t c = 0; c < size.width; ++c)
                    encoded[r * size.columns + n].add(to_double(dy[r * size.width + c]) *
                                                      to_double(weight[n * size.width + c]));
            }
    }

    // Where the k largest of `count` scores stand, ascending; of equal ones the first.
    template <class Score> static std::vector<int64_t> best(const Score &score, int64_t count, int64_t k) {
        std::vector<int64_t> order(count);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score(a) > score(b); });
        order.resize(k);
        std::sort(order.begin(), order.end());
        return order;
    }
};

template <class T>
void check_chosen(const std::string &what, const GuardedArray<T> &values, const GuardedArray<int32_t> &indices,
                  const std::vector<double> &expected, const std::vector<int64_t> &places) {
    for (size_t i = 0; i < places.size(); ++i)
        if (to_double(values[i]) != to_double(round_to<T>(expected[i])) || indices[i] != places[i]) {
            std::cerr << "WRONG RESULT: " << what << ": entry " << i << std::endl;
            std::_Exit(1);
        }
}

// What is larger than its column's threshold, or not zero where there are none.
template <class T>
void check_above(RowOperands<T> &o, const Kernels<T> &kernels, const T *thresholds, int threads,
                 const std::string &where) {
    const auto [rows, columns, width, k] = o.size;
    const Rows<const T> scores{o.scores.data(), columns};
    std::vector<int64_t> of_above;
    std::vector<double> expected_above;
    for (int64_t i = 0; i < rows * columns; ++i) {
        const double score = to_double(o.scores[i]);
        if (thresholds ? score > to_double(thresholds[i % columns]) : score != 0) {
            of_above.push_back(i % columns);
            expected_above.push_back(score);
        }
    }
    const GuardedArray<int32_t> crow(rows + 1);
    const int64_t count = count_above<T>(kernels, scores, rows, columns, thresholds, crow.data(), threads);
    if (static_cast<int64_t>(of_above.size()) != count) {
        std::cerr << "WRONG RESULT: count_above, " << where << std::endl;
        std::_Exit(1);
    }
    const GuardedArray<T> values(count);
    const GuardedArray<int32_t> indices(count);
    take_above<T>(kernels, scores, rows, columns, thresholds, crow.data(), indices.data(), values.data(), threads);
    check_chosen("take_above, " + where, values, indices, expected_above, of_above);
}

template <class T>
void check_selections(RowOperands<T> &o, const Kernels<T> &kernels, int threads, const std::string &where) {
    const auto [rows, columns, width, k] = o.size;
    std::vector<int64_t> of_rows, of_encoder, of_batch;
    std::vector<double> row_values, encoder_values, batch_values;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i : o.best([&](int64_t i) { return to_double(o.scores[r * columns + i]); }, columns, k)) {
            of_rows.push_back(i);
            row_values.push_back(to_double(o.scores[r * columns + i]));
        }
        for (int64_t i : o.best([&](int64_t i) { return o.encoded[r * columns + i].value; }, columns, k)) {
            of_encoder.push_back(i);
            encoder_values.push_back(o.encoded[r * columns + i].value);
        }
    }
    for (int64_t i : o.best([&](int64_t i) { return to_double(o.scores[i]); }, rows * columns, rows * k)) {
        of_batch.push_back(i % columns);
        batch_values.push_back(to_double(o.scores[i]));
    }
    const Rows<const T> scores{o.scores.data(), columns};
    const GuardedArray<T> values(rows * k);
    const GuardedArray<int32_t> indices(rows * k), crow(rows + 1);
    topk<T>(kernels, scores, rows, columns, k, values.data(), indices.data(), threads);
    check_chosen("topk, " + where, values, indices, row_values, of_rows);
    batch_topk<T>(kernels, scores, rows, columns, rows * k, crow.data(), indices.data(), values.data(), threads);
    check_chosen("batch_topk, " + where, values, indices, batch_values, of_batch);
    encode_topk<T>(kernels, {o.dy.data(), 1, width}, rows, width, {o.weight.data(), width}, columns, o.bias.data(), k,
                   values.data(), indices.data(), threads);
    check_chosen("encode_topk, " + where, values, indices, encoder_values, of_encoder);
    check_above<T>(o, kernels, o.bias.data(), threads, where);
    check_above<T>(o, kernels, nullptr, threads, where);
}

template <class T> void check_rows(const RowSize &size) {
    RowOperands<T> o(size);
    const auto crow = GuardedArray<int32_t>::read_only(o.crow), index = GuardedArray<int32_t>::read_only(o.index);
    const Csr csr{crow.data(), index.data(), size.rows};
    const std::string what = std::to_string(size.rows) + " rows of " + std::to_string(size.columns);
    run_everywhere<T>(what, [&](const Kernels<T> &kernels, int threads, const std::string &where) {
        const GuardedArray<T> y(o.y.size()), dots(o.dots.size()), gradient(o.gradient.size());
        const Rows<const T> weight{o.weight.data(), size.width}, dy{o.dy.data(), size.width};
        if (!rows_fit(csr, static_cast<int64_t>(o.index.size()), size.columns)) {
            std::cerr << "WRONG RESULT: rows_fit, " << where << std::endl;
            std::_Exit(1);
        }
        rows_matmul<T>(kernels, csr, o.values.data(), weight, size.width, {y.data(), size.width}, false, threads);
        check("rows_matmul, " + where, y, o.y, true);
        rows_dots<T>(kernels, csr, dy, weight, size.width, dots.data(), threads);
        check("rows_dots, " + where, dots, o.dots, true);
        rows_weight_gradient<T>(kernels, csr, o.values.data(), dy, size.columns, size.width,
                                {gradient.data(), size.width}, false, threads);
        check("rows_weight_gradient, " + where, gradient, o.gradient, true);
        std::copy_n(o.weight.data(), o.weight.size(), gradient.data());
        rows_weight_gradient<T>(kernels, csr, o.values.data(), dy, size.columns, size.width,
                                {gradient.data(), size.width}, true, threads);
        check("rows_weight_gradient added, " + where, gradient, o.added, true);
        const GuardedArray<T> dense(o.dense.size()), picked(o.picked.size());
        rows_written_out<T>(csr, o.values.data(), size.columns, dense.data(), threads);
        check("rows_written_out, " + where, dense, o.dense, true);
        rows_picked<T>(csr, o.scores.data(), size.columns, picked.data(), threads);
        check("rows_picked, " + where, picked, o.picked, true);
        check_selections(o, kernels, threads, where);
    });
}

} // namespace

void check_all_rows() {
    for (const RowSize &size : sizes) {
        check_rows<float>(size);
        check_rows<double>(size);
        check_rows<bfloat16>(size);
    }
    std::cout << "sparse rows: every result is right" << std::endl;
}
