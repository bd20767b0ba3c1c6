// The operands of every product on one problem, each in memory of its own that nobody may write to, and what the
// products must give: plain loops in float64.
#pragma once

#include "checks.h"
#include "problems.h"
#include "products.h"

#include <random>
#include <vector>

// How activations lie in memory, and whether the product is then asked for with a bias.
struct Storage {
    const char *name;
    bool feature_major;
    int64_t padding; // entries between neighbouring rows that belong to nobody
    bool bias;
};
constexpr Storage storages[] = {{"token-major", false, 0, false},
                                {"token-major with gaps, bias", false, 3, true},
                                {"feature-major, bias", true, 0, true},
                                {"feature-major with gaps", true, 3, false}};

template <class T> class Activations {
  public:
    // `entries` are [batch, features].
    Activations(const std::vector<T> &entries, int64_t features, int64_t batch, const Storage &storage)
        : feature_stride(storage.feature_major ? std::max<int64_t>(1, batch) + storage.padding : 1),
          batch_stride(storage.feature_major ? 1 : std::max<int64_t>(1, features) + storage.padding),
          memory(features * batch == 0 ? 0 : (features - 1) * feature_stride + (batch - 1) * batch_stride + 1) {
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t f = 0; f < features; ++f)
                memory[f * feature_stride + b * batch_stride] = entries[b * features + f];
        memory.make_read_only();
    }
    offpath::Matrix<T> matrix() const { return {memory.data(), feature_stride, batch_stride}; }

  private:
    int64_t feature_stride, batch_stride;
    GuardedArray<T> memory;
};

enum class Draw { small_integers, gaussian };

template <class T> std::vector<T> drawn(int64_t count, Draw draw, std::mt19937_64 &generator) {
    std::uniform_int_distribution<int> integer(-3, 3);
    std::normal_distribution<double> gaussian;
    std::vector<T> entries(count);
    for (T &entry : entries)
        entry = round_to<T>(draw == Draw::small_integers ? integer(generator) : gaussian(generator));
    return entries;
}

template <class T> struct Operands {
    const Draw draw;
    const int64_t batch;
    const Pattern pattern;
    const Transpose transpose;
    std::vector<T> value_entries, bias_entries, x_entries, dy_entries, dense_entries;
    std::vector<GuardedArray<T>> blocks;
    std::vector<Activations<T>> x, dy; // one for each storage
    std::vector<Sum64> y, y_with_bias, dx, dvalues, dbias, expanded, compressed;

    Operands(const Problem &problem, Draw draw)
        : draw(draw), batch(problem.batch), pattern(make_pattern(problem.rows, problem.columns, problem.connected)),
          transpose(transpose_of(pattern)) {
        std::mt19937_64 generator(1);
        const int64_t rows = pattern.rows, columns = pattern.columns;
        value_entries = drawn<T>(pattern.nnz(), draw, generator);
        bias_entries = drawn<T>(rows, draw, generator);
        dense_entries = drawn<T>(rows * columns, draw, generator);
        x_entries = drawn<T>(batch * columns, draw, generator);
        dy_entries = drawn<T>(batch * rows, draw, generator);
        for (const auto *entries : {&value_entries, &bias_entries, &dense_entries})
            blocks.push_back(GuardedArray<T>::read_only(*entries));
        for (const Storage &storage : storages) {
            x.emplace_back(x_entries, columns, batch, storage);
            dy.emplace_back(dy_entries, rows, batch, storage);
        }
        compute();
    }

    const T *values() const { return blocks[0].data(); }
    const T *bias() const { return blocks[1].data(); }
    const T *dense() const { return blocks[2].data(); }

  private:
    void compute() {
        const int64_t rows = pattern.rows, columns = pattern.columns;
        y.resize(batch * rows);
        dx.resize(batch * columns);
        dvalues.resize(pattern.nnz());
        dbias.resize(rows);
        for (int64_t i = 0; i < batch * rows; ++i)
            dbias[i % rows].add(to_double(dy_entries[i]));
        expanded.resize(rows * columns);
        compressed.resize(pattern.nnz());
        for (int64_t r = 0; r < rows; ++r)
            for (int32_t s = pattern.crow_indices[r]; s < pattern.crow_indices[r + 1]; ++s) {
                const int64_t c = pattern.col_indices[s];
                const double value = to_double(value_entries[s]);
                expanded[r * columns + c].add(value);
                compressed[s].add(to_double(dense_entries[r * columns + c]));
                for (int64_t b = 0; b < batch; ++b) {
                    const double x_entry = to_double(x_entries[b * columns + c]),
                                 dy_entry = to_double(dy_entries[b * rows + r]);
                    y[b * rows + r].add(value * x_entry);
                    dx[b * columns + c].add(value * dy_entry);
                    dvalues[s].add(dy_entry * x_entry);
                }
            }
        y_with_bias = y;
        for (int64_t i = 0; i < batch * rows; ++i)
            y_with_bias[i].add(to_double(bias_entries[i % rows]));
    }
};
