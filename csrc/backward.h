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
    bool over_bits() const { return !transpose || !tiles; }
};

// backward(), where something goes over bits, on AMX: what goes over a plan has panels, what goes over bits has tiles.
inline void amx_backward(const Kernels<bfloat16> &kernels, const Ways &ways, int64_t rows, int64_t columns, int64_t nnz,
                         const bfloat16 *values, const Matrix<bfloat16> &dy, const Matrix<bfloat16> &x, int64_t batch,
                         bfloat16 *dx, bool feature_major, bfloat16 *dvalues, bfloat16 *dbias, int threads) {
    const AmxKernels &amx = *kernels.amx;
    const OnTiles filled{amx};
    const Panels<bfloat16> dy_panels(kernels, dy, rows, ways.transpose || ways.tiles ? batch : 0);
    const Panels<bfloat16> x_panels(kernels, x, columns, ways.tiles ? batch : 0);
    const TileStrips dy_of_dx = filled.dy_of_dx(dy, rows, ways.transpose ? 0 : batch);
    const TileStrips dy_of_dvalues = filled.dy_of_dvalues(dy, ways.tiles ? 0 : rows, batch);
    const TileStrips x_of_dvalues = filled.x_of_dvalues(x, ways.tiles ? 0 : columns, batch);
    const int packers = threads_for((rows + columns) * batch + nnz, threads);
    const int workers = threads_for((nnz + rows + columns) * batch, threads);
    if (ways.transpose) {
        const OrderedValues<bfloat16> ordered(kernels, *ways.transpose, values);
        run_together(packers, dy_panels, dy_of_dvalues, x_of_dvalues, ordered);
        with_planned_product<bfloat16>(
            kernels, *ways.transpose, ordered, nullptr, dy_panels, batch, dx, feature_major, [&](const auto &of_x) {
                run_together(workers, filled.dvalues(*ways.bits, dy_of_dvalues, x_of_dvalues, batch, dvalues), of_x,
                             LineSums(amx, dy_of_dvalues, rows, batch, dbias));
            });
        return;
    }
    run_together(packers, dy_panels, x_panels, dy_of_dx, dy_of_dvalues, x_of_dvalues);
    const auto of_x = filled.dx(*ways.bits, values, dy_of_dx, batch, dx, feature_major, workers);
    if (ways.tiles)
        run_together(workers, of_x,
                     TiledGradient<bfloat16>(kernels, *ways.tiles, dy_panels, x_panels, batch, dvalues, workers),
                     BiasGradient<bfloat16>(kernels, dy_panels, rows, batch, dbias));
    else
        run_together(workers, of_x, filled.dvalues(*ways.bits, dy_of_dvalues, x_of_dvalues, batch, dvalues),
                     LineSums(amx, dy_of_dvalues, rows, batch, dbias));
}

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
    if constexpr (std::is_same_v<T, bfloat16>)
        if (kernels.amx && ways.over_bits())
            return amx_backward(kernels, ways, rows, columns, nnz, values, dy, x, batch, dx, feature_major, dvalues,
                                dbias, threads);
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
