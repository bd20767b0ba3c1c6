// All gradients of a layer at once.
#pragma once

#include "filled_products.h"

namespace offpath {

// What the gradients go over: dx over the plan of the transposed weight, dvalues over tiles; null where it goes over
// the weight's bits.
struct Ways {
    const ProductPlan *transpose;
    const Tiles *tiles;
    const BitMatrix *bits; // may be null where nothing goes over it

    bool fits(const Layout &layout) const { return !transpose || transpose->fits(layout); }
};

// dx [batch, columns] ([columns, batch] where feature_major), dvalues and dbias. dy is packed once, and the threads
// meet twice.
template <class T>
void backward(const Kernels<T> &kernels, const Ways &ways, int64_t rows, int64_t columns, int64_t nnz, const T *values,
              const Matrix<T> &dy, const Matrix<T> &x, int64_t batch, T *dx, bool feature_major, T *dvalues, T *dbias,
              int threads) {
    if (batch == 0) {
        std::fill_n(dvalues, nnz, T{});
        std::fill_n(dbias, rows, T{});
        return;
    }
    const Panels<T> dy_panels(kernels, dy, rows, batch);
    const Panels<T> x_panels =
        ways.tiles ? Panels<T>(kernels, x, columns, batch) : Panels<T>(kernels, exchanged(x), batch, columns);
    const BiasGradient<T> of_bias(kernels, dy_panels, rows, batch, dbias);
    const int packers = threads_for((rows + columns) * batch + nnz, threads);
    const int workers = threads_for((nnz + rows + columns) * batch, threads);
    const auto with_gradient = [&](const auto &body) {
        if (ways.tiles)
            body(TiledGradient<T>(kernels, *ways.tiles, dy_panels, x_panels, batch, dvalues, workers));
        else
            body(FilledGradient<T>(kernels, *ways.bits, dy_panels, x_panels, batch, dvalues));
    };
    // The longest tasks first, so that at the end there are only short ones to share out.
    if (ways.transpose) {
        const OrderedValues<T> ordered(kernels, *ways.transpose, values);
        run_together(packers, dy_panels, x_panels, ordered);
        with_planned_product<T>(
            kernels, *ways.transpose, ordered, nullptr, dy_panels, batch, dx, feature_major, [&](const auto &of_x) {
                with_gradient([&](const auto &of_values) { run_together(workers, of_values, of_x, of_bias); });
            });
    } else {
        run_together(packers, dy_panels, x_panels);
        const FilledInputGradient<T> of_x(kernels, *ways.bits, values, dy_panels, batch, dx, feature_major, workers);
        with_gradient([&](const auto &of_values) { run_together(workers, of_x, of_values, of_bias); });
    }
}

} // namespace offpath
