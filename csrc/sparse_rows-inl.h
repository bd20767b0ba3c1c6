// The products of sparse rows with a sparse weight: the connections of the inputs that live, and nothing else.
#pragma once

#include "reduce-inl.h"
#include "simd.h"
#include "table.h"

namespace {

// While the connections of one input are used, those of the next are fetched: they lie anywhere in memory.
template <class T>
[[gnu::always_inline]] inline void fetch_connection(const offpath::SparseWeight<T> &weight, int64_t s) {
    __builtin_prefetch(weight.connections.col_indices + s);
    __builtin_prefetch(weight.values + s);
}

// sums[o] += value * weight for the connections from `begin` to `end`; one by one, as the processor would take a
// scatter apart.
template <class T>
[[gnu::always_inline]] inline void scatter_add(const offpath::SparseWeight<T> &weight, int64_t begin, int64_t end,
                                               int64_t next, offpath::Sum<T> value, offpath::Sum<T> *sums) {
    using S = Simd<offpath::Sum<T>>;
    alignas(64) offpath::Sum<T> products[S::lanes];
    const typename S::V factor = S::set1(value);
    const int32_t *outputs = weight.connections.col_indices;
    int64_t s = begin;
    for (; end - s >= S::lanes; s += S::lanes, next += S::lanes) {
        fetch_connection(weight, next);
        S::store(products, S::fma(factor, S::load_first(weight.values + s, S::lanes), S::zero()));
#pragma GCC unroll 16
        for (int i = 0; i < S::lanes; ++i)
            sums[outputs[s + i]] += products[i];
    }
    S::store(products, S::fma(factor, S::load_first(weight.values + s, end - s), S::zero()));
    for (int64_t i = 0; i < end - s; ++i)
        sums[outputs[s + i]] += products[i];
}

template <class T> void sparse_matmul(const offpath::sparse_matmul_args<T> &args, const offpath::Block &block) {
    const int32_t *inputs = args.entries.col_indices, *connections = args.weight.connections.crow_indices;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const int64_t first = args.entries.crow_indices[row], count = args.entries.crow_indices[row + 1] - first;
        for (int64_t part = block.batch_begin; part < block.batch_end; ++part) {
            offpath::Sum<T> *sums = args.sums + (part * args.rows + row - args.first_row) * args.width;
            for (int64_t o = 0; o < args.width; ++o)
                sums[o] = 0;
            const int64_t end = first + count * (part + 1) / args.parts;
            for (int64_t s = first + count * part / args.parts; s < end; ++s) {
                const int64_t input = inputs[s], next = inputs[s + 1 < end ? s + 1 : s];
                scatter_add(args.weight, connections[input], connections[input + 1], connections[next],
                            compute(args.values[s]), sums);
            }
        }
    }
}

// A register of sums over the connections from `begin` to `end`, of weight * dy.
template <class T>
[[gnu::always_inline]] inline typename Simd<offpath::Sum<T>>::V
dot_at(const offpath::SparseWeight<T> &weight, int64_t begin, int64_t end, int64_t next, const offpath::Sum<T> *dy) {
    using S = Simd<offpath::Sum<T>>;
    const int32_t *outputs = weight.connections.col_indices;
    typename S::V acc = S::zero();
    int64_t s = begin;
    for (; end - s >= S::lanes; s += S::lanes, next += S::lanes) {
        fetch_connection(weight, next);
        acc = S::fma(S::load_first(weight.values + s, S::lanes), S::load_at(dy, outputs + s), acc);
    }
    return S::fma(S::load_first(weight.values + s, end - s), S::load_first_at(dy, outputs + s, end - s), acc);
}

template <class T> void sparse_dots(const offpath::sparse_dots_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int together = summed_together<offpath::Sum<T>>;
    const int32_t *inputs = args.entries.col_indices, *connections = args.weight.connections.crow_indices;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        const offpath::Sum<T> *dy = args.dy + row * args.dy_stride;
        const int64_t end = args.entries.crow_indices[row + 1];
        for (int64_t first = args.entries.crow_indices[row]; first < end; first += together) {
            const int64_t count = end - first < together ? end - first : together;
            typename S::V acc[together];
            for (int i = 0; i < together; ++i)
                acc[i] = S::zero();
            for (int64_t i = 0; i < count; ++i) {
                const int64_t s = first + i, input = inputs[s], next = inputs[s + 1 < end ? s + 1 : s];
                acc[i] = dot_at(args.weight, connections[input], connections[input + 1], connections[next], dy);
            }
            S::store_first(args.dots + first, sum_some<offpath::Sum<T>>(acc), count);
        }
    }
}

template <class T> void sparse_gradient(const offpath::sparse_gradient_args<T> &args, const offpath::Block &block) {
    using S = Simd<offpath::Sum<T>>;
    for (int64_t input = block.row_begin; input < block.row_end; ++input) {
        const int64_t first = args.users.crow_indices[input], last = args.users.crow_indices[input + 1];
        const int64_t end = args.connections.crow_indices[input + 1];
        for (int64_t s = args.connections.crow_indices[input]; s < end; s += S::lanes) {
            const int32_t *outputs = args.connections.col_indices + s;
            const int64_t n = end - s < S::lanes ? end - s : S::lanes;
            typename S::V acc = S::zero();
            for (int64_t user = first; user < last; ++user) {
                const offpath::Sum<T> *dy = args.dy + args.users.col_indices[user] * args.dy_stride;
                acc = S::fma(S::set1(compute(args.values[user])),
                             n == S::lanes ? S::load_at(dy, outputs) : S::load_first_at(dy, outputs, n), acc);
            }
            S::store_first(args.gradient + s, acc, n);
        }
    }
}

} // namespace
