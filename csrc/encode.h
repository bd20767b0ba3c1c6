// The encoder of a top-k autoencoder: scores against every row of a dense weight, of which only the largest are kept.
#pragma once

#include "selection.h"

namespace offpath {

// Rows of the weight between two looks at how much room there is.
constexpr int64_t rows_per_look = 8 * group_rows;

// What was found of the tokens of one panel in one part of the weight.
template <class T> class FoundOfPanel {
  public:
    FoundOfPanel(int64_t tokens, int64_t panel_width, int64_t k)
        : k(k), capacity(std::max<int64_t>(2 * k, 64) + rows_per_look), values(scratch<Sum<T>>(tokens * capacity)),
          indices(scratch<int32_t>(tokens * capacity)), found(tokens),
          thresholds(panel_width, std::numeric_limits<Sum<T>>::infinity()) {
        for (int64_t t = 0; t < tokens; ++t) {
            found[t] = {&values[t * capacity], &indices[t * capacity], 0, nan_of<Sum<T>>};
            thresholds[t] = nan_of<Sum<T>>;
        }
    }

    void make_room() {
        for (size_t t = 0; t < found.size(); ++t)
            if (found[t].count + rows_per_look > capacity) {
                shrink(found[t], k, keys);
                thresholds[t] = found[t].threshold;
            }
    }

    const int64_t k, capacity;

  private:
    const Scratch<Sum<T>> values;
    const Scratch<int32_t> indices;
    std::vector<SortKey<Sum<T>>> keys;

  public:
    std::vector<Found<Sum<T>>> found;
    std::vector<Sum<T>> thresholds;
};

// values, indices [batch, k]: the k largest of bias[r] + <weight[r], x[b]> over the rows r of the weight, ascending in
// the index, in the type of the sums and then rounded. A task computes one panel of tokens with one part of the weight.
template <class T>
void encode_topk(const Kernels<T> &kernels, const Matrix<T> &x, int64_t batch, int64_t width, Rows<const T> weight,
                 int64_t rows, const T *bias, int64_t k, T *values, int32_t *indices, int threads) {
    if (k == 0 || batch == 0)
        return;
    const Panels<T> panels(kernels, x, width, batch);
    const int workers = threads_for(batch * rows * width, threads);
    run_together(workers, panels);
    const int64_t panel_width = kernels.layout.panel_width;
    const int64_t panel_bytes =
        panel_width * kernels.layout.panel_entry_bytes * (width + kernels.layout.columns_per_step - 1);
    const int64_t looks = ceil_div(rows, rows_per_look);
    const int64_t parts = std::clamp<int64_t>(ceil_div(4 * workers, panels.count), 1, ceil_div(looks, 16));
    std::vector<std::unique_ptr<FoundOfPanel<T>>> found(panels.count * parts);
    parallel_for(panels.count * parts, workers, [&](int64_t task) {
        const int64_t panel = task / parts, part = task % parts;
        const int64_t tokens = std::min(panel_width, batch - panel * panel_width);
        found[task] = std::make_unique<FoundOfPanel<T>>(tokens, panel_width, k);
        FoundOfPanel<T> &of_task = *found[task];
        const encode_args<T> args{weight,
                                  bias,
                                  static_cast<const char *>(panels.data()) + panel * panel_bytes,
                                  width,
                                  tokens,
                                  of_task.found.data(),
                                  of_task.thresholds.data()};
        for (int64_t look = looks * part / parts; look < looks * (part + 1) / parts; ++look) {
            of_task.make_room();
            kernels.encode(args, {look * rows_per_look, std::min(rows, (look + 1) * rows_per_look), 0, 0});
        }
    });
    constexpr int64_t tokens_per_task = 16;
    parallel_for(ceil_div(batch, tokens_per_task), workers, [&](int64_t task) {
        std::vector<Sum<T>> merged_values;
        std::vector<int32_t> merged_indices;
        std::vector<SortKey<Sum<T>>> keys;
        for (int64_t b = task * tokens_per_task; b < std::min(batch, (task + 1) * tokens_per_task); ++b) {
            merged_values.clear();
            merged_indices.clear();
            for (int64_t part = 0; part < parts; ++part) {
                const Found<Sum<T>> &of_part = found[b / panel_width * parts + part]->found[b % panel_width];
                merged_values.insert(merged_values.end(), of_part.values, of_part.values + of_part.count);
                merged_indices.insert(merged_indices.end(), of_part.indices, of_part.indices + of_part.count);
            }
            keep_largest(merged_values.data(), static_cast<int64_t>(merged_values.size()), k, keys,
                         [&](int64_t from, int64_t to) {
                             if constexpr (std::is_same_v<T, Sum<T>>)
                                 values[b * k + to] = merged_values[from];
                             else
                                 values[b * k + to] = narrow(merged_values[from]);
                             indices[b * k + to] = merged_indices[from];
                         });
        }
    });
}

} // namespace offpath
