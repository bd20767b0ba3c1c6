// Sums over the lanes of several registers at once.
#pragma once

#include "simd.h"

namespace {

// Lane i of the result is the sum over the lanes of a[i], by a tree that is the same for every i. Destroys a.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::V sum_each(typename Simd<T>::V (&a)[Simd<T>::lanes]) {
    using S = Simd<T>;
#pragma GCC unroll 4
    for (int half = S::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            a[i] = S::add(S::interleave_low(a[i], a[i + half]), S::interleave_high(a[i], a[i + half]));
    return a[0];
}

// How many registers sum_some takes: what one quarter of the widest register holds, if there are so many lanes.
template <class T> constexpr int summed_together = Simd<T>::lanes < 4 ? Simd<T>::lanes : 4;

// The first lanes of the result are the sums over the lanes of a[0], a[1] ..., by a tree that is the same for all.
template <class T>
[[gnu::always_inline]] inline typename Simd<T>::V sum_some(const typename Simd<T>::V (&a)[summed_together<T>]) {
    using S = Simd<T>;
    if constexpr (requires { S::sum_four(a); }) {
        return S::sum_four(a);
    } else {
        typename S::V all[S::lanes];
#pragma GCC unroll 16
        for (int i = 0; i < S::lanes; ++i)
            all[i] = i < summed_together<T> ? a[i] : S::zero();
        return sum_each<T>(all);
    }
}

} // namespace
