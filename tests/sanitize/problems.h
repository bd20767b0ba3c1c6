// The shapes, patterns and batches that every product is run on.
#pragma once

#include "guarded.h"
#include "table.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

// Canonical CSR, each array in memory of its own.
struct Pattern {
    GuardedArray<int32_t> crow_indices, col_indices;
    int64_t rows, columns;

    int64_t nnz() const { return static_cast<int64_t>(col_indices.size()); }
    offpath::Csr csr() const { return {crow_indices.data(), col_indices.data(), rows}; }
};

using Connected = std::function<bool(int64_t row, int64_t column)>;

inline Pattern make_pattern(int64_t rows, int64_t columns, const Connected &connected) {
    std::vector<int32_t> crow_indices{0}, col_indices;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
            if (connected(r, c))
                col_indices.push_back(static_cast<int32_t>(c));
        crow_indices.push_back(static_cast<int32_t>(col_indices.size()));
    }
    return {GuardedArray<int32_t>::read_only(crow_indices), GuardedArray<int32_t>::read_only(col_indices), rows,
            columns};
}

// The transpose, and which slot of the original each of its slots is.
struct Transpose {
    Pattern pattern;
    GuardedArray<int32_t> permutation;
};

inline Transpose transpose_of(const Pattern &pattern) {
    std::vector<std::vector<int32_t>> rows_of(pattern.columns), slots_of(pattern.columns);
    for (int64_t r = 0; r < pattern.rows; ++r)
        for (int32_t s = pattern.crow_indices[r]; s < pattern.crow_indices[r + 1]; ++s) {
            rows_of[pattern.col_indices[s]].push_back(static_cast<int32_t>(r));
            slots_of[pattern.col_indices[s]].push_back(s);
        }
    std::vector<int32_t> crow_indices{0}, col_indices, permutation;
    for (int64_t c = 0; c < pattern.columns; ++c) {
        col_indices.insert(col_indices.end(), rows_of[c].begin(), rows_of[c].end());
        permutation.insert(permutation.end(), slots_of[c].begin(), slots_of[c].end());
        crow_indices.push_back(static_cast<int32_t>(col_indices.size()));
    }
    return {{GuardedArray<int32_t>::read_only(crow_indices), GuardedArray<int32_t>::read_only(col_indices),
             pattern.columns, pattern.rows},
            GuardedArray<int32_t>::read_only(permutation)};
}

struct Problem {
    std::string name;
    int64_t rows, columns, batch;
    Connected connected;
};

inline Problem random_problem(int64_t rows, int64_t columns, double density, int64_t batch) {
    auto generator = std::make_shared<std::mt19937_64>(rows * 7919 + columns);
    const Connected connected = [=](int64_t, int64_t) { return std::bernoulli_distribution(density)(*generator); };
    const std::string name = std::to_string(rows) + " x " + std::to_string(columns) + ", " +
                             std::to_string(static_cast<int>(100 * density)) + " % connected, batch of " +
                             std::to_string(batch);
    return {name, rows, columns, batch, connected};
}

inline std::vector<Problem> problems() {
    std::vector<Problem> all;
    // Every tail of every vector and panel.
    for (int64_t batch = 0; batch <= 70; ++batch)
        all.push_back(random_problem(9, 23, 0.3, batch));
    for (const int64_t batch : {127, 128, 129, 255, 256, 257, 300})
        all.push_back(random_problem(13, 40, 0.2, batch));
    // Rows in groups of six and tiles of 48, columns in words of 64 bits and registers of up to 32 entries.
    for (const int64_t size : {0, 1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 128, 129}) {
        all.push_back(random_problem(size, 7, 0.5, 9));
        all.push_back(random_problem(7, size, 0.5, 9));
        all.push_back(random_problem(size, size, 0.3, 17));
        all.push_back(random_problem(size, 1, 0.5, 1 + size % 8));
        all.push_back(random_problem(1, size, 1.0, 33));
    }
    for (const int64_t batch : {0, 1, 8, 33}) {
        const auto add = [&](const std::string &name, const Connected &connected) {
            all.push_back({name + ", batch of " + std::to_string(batch), 14, 70, batch, connected});
        };
        add("no connections", [](int64_t, int64_t) { return false; });
        add("every connection", [](int64_t, int64_t) { return true; });
        add("only the first row", [](int64_t r, int64_t) { return r == 0; });
        add("only the last row", [](int64_t r, int64_t) { return r == 13; });
        add("only the first column", [](int64_t, int64_t c) { return c == 0; });
        add("only the last column", [](int64_t, int64_t c) { return c == 69; });
        add("rows of one connection to all", [](int64_t r, int64_t c) { return c <= 5 * r; });
    }
    // Enough work to be split over threads: rows, the batch, packing, the way back, the plan and the bits; and enough
    // panels for several rounds of the weight gradient.
    all.push_back(random_problem(120, 100, 0.1, 150));
    all.push_back(random_problem(12, 700, 0.1, 400));
    all.push_back(random_problem(700, 12, 0.1, 100));
    all.push_back(random_problem(130, 700, 0.9, 2));
    // Several tiles of the weight gradient, and blocks of tokens before the last one.
    all.push_back(random_problem(1030, 150, 0.1, 5));
    all.push_back(random_problem(20, 300, 0.3, 300));
    all.push_back({"one long row", 64, 1100, 70, [](int64_t r, int64_t c) { return r == 17 || (r + c) % 200 == 0; }});
    // Several strips of the gradients over bits, of several rows.
    all.push_back(random_problem(70, 4200, 0.1, 9));
    return all;
}
