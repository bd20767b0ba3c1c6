// What a result must be: exact for small integers, and otherwise within the a-priori bound for any order of summation,
// |y - y64| <= gamma_k |A||x| with gamma_k = k u / (1 - k u) (Higham, "Accuracy and Stability", section 3.1).
#pragma once

#include "guarded.h"
#include "problems.h"
#include "table.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

using offpath::bfloat16;

template <class T>
constexpr const char *name_of = std::is_same_v<T, float>    ? "float32"
                                : std::is_same_v<T, double> ? "float64"
                                                            : "bfloat16";

inline double to_double(double a) { return a; }
inline double to_double(bfloat16 a) { return std::bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }

// To the nearest, ties to even.
template <class T> T round_to(double a) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(a));
        return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
    } else {
        return static_cast<T>(a);
    }
}

template <class T> constexpr double unit_roundoff = std::numeric_limits<T>::epsilon() / 2;
template <> inline constexpr double unit_roundoff<bfloat16> = 0x1p-8;

inline double gamma(int64_t k, double u) { return k * u / (1 - k * u); }

// One sum in float64: its value, the sum of the magnitudes of its terms, and how many there are.
struct Sum64 {
    double value = 0, size = 0;
    int64_t terms = 0;

    void add(double term) {
        value += term;
        size += std::abs(term);
        ++terms;
    }
};

template <class T> double bound(const Sum64 &sum) {
    using Summed = offpath::Sum<T>;
    // A term is rounded when it is multiplied and at each of at most terms - 1 additions; the float64 sum errs
    // likewise.
    double result = (gamma(sum.terms, unit_roundoff<Summed>) + gamma(sum.terms, unit_roundoff<double>)) * sum.size;
    if constexpr (!std::is_same_v<T, Summed>) // the sum is rounded once more
        result += unit_roundoff<T> * (std::abs(sum.value) + result);
    return result;
}

template <class T>
void check(const std::string &what, const GuardedArray<T> &got, const std::vector<Sum64> &expected, bool exact) {
    for (size_t i = 0; i < expected.size(); ++i) {
        const double y = to_double(got[i]);
        const bool right = exact ? y == to_double(round_to<T>(expected[i].value))
                                 : std::abs(y - expected[i].value) <= bound<T>(expected[i]);
        if (!right) { // so that NaN is wrong
            std::cerr << "WRONG RESULT: " << what << ": entry " << i << " of " << expected.size() << " is " << y
                      << ", expected " << expected[i].value << std::endl;
            std::_Exit(1);
        }
    }
}
