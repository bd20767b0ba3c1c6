// Which of many scores are the largest: kernels find what is larger than a running threshold, and here the threshold is
// raised whenever there is no room for more.
#pragma once

#include "lanes.h"
#include "products.h"
#include "transposed.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace offpath {

// An integer that sorts like x: NaN last, zeros alike.
inline int32_t sort_key(float x) {
    if (x != x)
        return std::numeric_limits<int32_t>::max();
    const int32_t bits = __builtin_bit_cast(int32_t, x + 0.0f);
    return bits ^ (bits >> 31 & std::numeric_limits<int32_t>::max());
}
inline int64_t sort_key(double x) {
    if (x != x)
        return std::numeric_limits<int64_t>::max();
    const int64_t bits = __builtin_bit_cast(int64_t, x + 0.0);
    return bits ^ (bits >> 63 & std::numeric_limits<int64_t>::max());
}
inline int32_t sort_key(bfloat16 x) { return sort_key(widen(x)); }

template <class T> using SortKey = decltype(sort_key(T{}));

template <class T> constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();
template <> inline constexpr bfloat16 nan_of<bfloat16>{0x7FC0};

// Keeps the `k` largest of `count` values, in the order in which they stand; of equal ones the first. Calls
// keep(from, to) for each that stays, and returns the smallest of them (NaN, which everything passes, if there are
// fewer than k). `keys` is working memory.
template <class T, class Keep>
T keep_largest(const T *values, int64_t count, int64_t k, std::vector<SortKey<T>> &keys, const Keep &keep) {
    if (k == 0 || count < k) {
        for (int64_t i = 0; i < (k ? count : 0); ++i)
            keep(i, i);
        return nan_of<T>;
    }
    keys.resize(2 * count);
    for (int64_t i = 0; i < count; ++i)
        keys[i] = keys[count + i] = sort_key(values[i]);
    const auto copy = keys.begin() + count;
    std::nth_element(copy, copy + (k - 1), keys.end(), std::greater<>());
    const auto smallest = copy[k - 1];
    int64_t ties = k - std::count_if(copy, copy + (k - 1), [&](auto key) { return key > smallest; });
    T threshold{};
    for (int64_t i = 0, kept = 0; kept < k; ++i) {
        if (keys[i] < smallest || (keys[i] == smallest && ties-- <= 0))
            continue;
        if (keys[i] == smallest)
            threshold = values[i];
        keep(i, kept++);
    }
    return threshold;
}

// The same for what was found of a row, in place.
template <class T> void shrink(Found<T> &found, int64_t k, std::vector<SortKey<T>> &keys) {
    found.threshold = keep_largest(found.values, found.count, k, keys, [&](int64_t from, int64_t to) {
        found.values[to] = found.values[from];
        found.indices[to] = found.indices[from];
    });
    found.count = std::min(found.count, k);
}

// Room for what is found of a row before the smaller part is dropped.
constexpr int64_t most_lanes = 16;
inline int64_t found_capacity(int64_t k) { return std::max<int64_t>(4 * k, 256) + most_lanes; }

// Buckets whose maxima bound the k-th largest of a row from below: so many, if the row has them, that hardly more than
// k entries pass. None where a row is too short for that to pay.
inline int64_t buckets_for(int64_t k, int64_t columns) {
    const int64_t buckets = std::min(8 * k, columns / 4) / most_lanes * most_lanes;
    return buckets >= 2 * k && buckets >= 64 ? buckets : 0;
}

// values, indices [rows, k]: the k largest of each row of x, ascending in the index.
template <class T>
void topk(const Kernels<T> &kernels, Rows<const T> x, int64_t rows, int64_t columns, int64_t k, T *values,
          int32_t *indices, int threads) {
    if (k == 0)
        return;
    const int64_t capacity = found_capacity(k), buckets = buckets_for(k, columns), rows_per_task = 4;
    parallel_for(ceil_div(rows, rows_per_task), threads_for(rows * columns, threads), [&](int64_t task) {
        const auto found_values = scratch<T>(capacity);
        const auto found_indices = scratch<int32_t>(capacity);
        std::vector<SortKey<T>> keys;
        std::vector<Sum<T>> maxima(buckets);
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row) {
            Found<T> found{found_values.get(), found_indices.get(), 0, nan_of<T>};
            if (buckets)
                kernels.bound({x.data + row * x.stride, columns, buckets, k, maxima.data(), &found.threshold}, {});
            for (int64_t next = 0; next < columns;) {
                kernels.find_above({x.data + row * x.stride, columns, capacity, nullptr, false, &next, &found}, {});
                shrink(found, k, keys);
            }
            std::copy_n(found.values, k, values + row * k);
            std::copy_n(found.indices, k, indices + row * k);
        }
    });
}

// crow_indices [rows + 1]: where the entries of each row begin that are larger than their column's threshold, or not
// zero where there are no thresholds. Returns how many there are in all; where these are more than an int32 counts,
// crow_indices mean nothing.
template <class T>
int64_t count_above(const Kernels<T> &kernels, Rows<const T> x, int64_t rows, int64_t columns, const T *thresholds,
                    int32_t *crow_indices, int threads) {
    const count_above_args<T> args{x, columns, thresholds, crow_indices + 1};
    parallel_for(rows, threads_for(rows * columns, threads),
                 [&](int64_t row) { kernels.count_above(args, {row, row + 1, 0, 0}); });
    int64_t count = crow_indices[0] = 0;
    for (int64_t row = 0; row < rows; ++row)
        crow_indices[row + 1] = static_cast<int32_t>(count += crow_indices[row + 1]);
    return count;
}

// Those entries; `indices` and `values` have room for what was counted.
template <class T>
void take_above(const Kernels<T> &kernels, Rows<const T> x, int64_t rows, int64_t columns, const T *thresholds,
                const int32_t *crow_indices, int32_t *indices, T *values, int threads) {
    parallel_for(rows, threads_for(rows * columns, threads), [&](int64_t row) {
        const int64_t begin = crow_indices[row], count = crow_indices[row + 1] - begin;
        Found<T> found{values + begin, indices + begin, 0, T{}};
        int64_t next = 0;
        // No more will be found than there is room for.
        kernels.find_above(
            {x.data + row * x.stride, columns, count + most_lanes, thresholds, !thresholds, &next, &found}, {});
    });
}

// What was found of many rows.
template <class T> struct FoundRows {
    std::vector<T> values;
    std::vector<int32_t> rows, indices;
    int64_t count = 0;

    T shrink(int64_t k, std::vector<SortKey<T>> &keys) {
        const T threshold = keep_largest(values.data(), count, k, keys, [&](int64_t from, int64_t to) {
            values[to] = values[from];
            rows[to] = rows[from];
            indices[to] = indices[from];
        });
        count = std::min(count, k);
        return threshold;
    }
};

// crow_indices [rows + 1], indices [k], values [k]: the k largest of all of x. Each thread searches a part of the rows.
template <class T>
void batch_topk(const Kernels<T> &kernels, Rows<const T> x, int64_t rows, int64_t columns, int64_t k,
                int32_t *crow_indices, int32_t *indices, T *values, int threads) {
    const int64_t parts = std::clamp<int64_t>(threads_for(rows * columns, threads), 1, std::max<int64_t>(rows, 1));
    std::vector<FoundRows<T>> found_of(parts);
    std::vector<SortKey<T>> keys;
    parallel_for(parts, static_cast<int>(parts), [&](int64_t part) {
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        const int64_t capacity = std::min((end - begin) * columns, 2 * k) + most_lanes;
        FoundRows<T> &all = found_of[part];
        all.values.resize(capacity);
        all.rows.resize(capacity);
        all.indices.resize(capacity);
        std::vector<SortKey<T>> keys_of_part;
        T threshold = nan_of<T>;
        for (int64_t row = begin; row < end; ++row)
            for (int64_t next = 0; next < columns;) {
                Found<T> found{all.values.data(), all.indices.data(), all.count, threshold};
                kernels.find_above({x.data + row * x.stride, columns, capacity, nullptr, false, &next, &found}, {});
                std::fill(all.rows.begin() + all.count, all.rows.begin() + found.count, static_cast<int32_t>(row));
                all.count = found.count;
                if (next < columns)
                    threshold = all.shrink(k, keys_of_part);
            }
        all.shrink(k, keys_of_part);
    });
    FoundRows<T> &first = found_of[0];
    for (int64_t part = 1; part < parts; ++part) {
        const FoundRows<T> &other = found_of[part];
        first.values.resize(first.count);
        first.rows.resize(first.count);
        first.indices.resize(first.count);
        first.values.insert(first.values.end(), other.values.begin(), other.values.begin() + other.count);
        first.rows.insert(first.rows.end(), other.rows.begin(), other.rows.begin() + other.count);
        first.indices.insert(first.indices.end(), other.indices.begin(), other.indices.begin() + other.count);
        first.count += other.count;
    }
    first.shrink(k, keys);
    std::copy_n(first.values.begin(), k, values);
    std::copy_n(first.indices.begin(), k, indices);
    count_indices(first.rows.data(), k, rows, crow_indices + 1);
    crow_indices[0] = 0;
    std::partial_sum(crow_indices + 1, crow_indices + 1 + rows, crow_indices + 1);
}

} // namespace offpath
