// Copies planes of images into blocks, and finished rows of a tile into planes.
#pragma once

#include "layout-inl.h"
#include "simd.h"
#include "table.h"
#include "transpose-inl.h"

namespace {

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The smallest w >= 0 with first + step * w >= bound.
inline int64_t reaches(int64_t first, int64_t step, int64_t bound) {
    return first >= bound ? 0 : (bound - first + step - 1) / step;
}

// Calls body(position, where in the image, count) for the runs of neighbours among the positions [begin, begin + count)
// that are pixels of the image; positions are counted from `begin`, and a row has `columns` of them.
template <class Body>
[[gnu::always_inline]] inline void each_run(const offpath::Planes &planes, const offpath::Phase &phase, int64_t pitch,
                                            int64_t columns, int64_t begin, int64_t count, const Body &body) {
    const offpath::Images &images = planes.images;
    const int64_t first = reaches(phase.first_column, planes.column_step, 0);
    const int64_t last = smaller_of(columns, reaches(phase.first_column, planes.column_step, images.width));
    for (int64_t h = begin / pitch; h * pitch < begin + count; ++h) {
        const int64_t row = phase.first_row + planes.row_step * h, start = h * pitch - begin;
        const int64_t from = larger_of(first, -start), to = smaller_of(last, count - start);
        if (row >= 0 && row < images.height && from < to)
            body(start + from,
                 row * images.row_stride + (phase.first_column + planes.column_step * from) * images.column_stride,
                 to - from);
    }
}

// Entries of T in memory and in a block.
template <class T> struct Entries {
    using Panel = typename Format<T>::Panel;
    using S = Simd<offpath::Sum<T>>;

    static void clear(Panel *to, int64_t count) {
        for (int64_t i = 0; i < count; i += S::lanes)
            S::store_first(to + i, S::zero(), smaller_of(count - i, S::lanes));
    }
    static void copy(const T *from, Panel *to, int64_t count) {
        for (int64_t i = 0; i < count; i += S::lanes) {
            const int64_t n = smaller_of(count - i, S::lanes);
            S::store_first(to + i, S::load_first(from + i, n), n);
        }
    }
    static Panel one(T entry) { return compute(entry); }
};

#ifdef OFFPATH_BFLOAT_PAIRS
template <> struct Entries<bfloat16> {
    using B = BfloatPairs;

    static void clear(bfloat16 *to, int64_t count) {
        for (int64_t i = 0; i < count; i += B::entries)
            B::store_first(to + i, B::zero(), smaller_of(count - i, B::entries));
    }
    static void copy(const bfloat16 *from, bfloat16 *to, int64_t count) {
        for (int64_t i = 0; i < count; i += B::entries) {
            const int64_t n = smaller_of(count - i, B::entries);
            B::store_first(to + i, B::load_first(from + i, n), n);
        }
    }
    static bfloat16 one(bfloat16 entry) { return entry; }
};
#endif

// The positions [begin, begin + width) of all planes of an image, one plane every `stride` entries.
template <class T>
void pack_planes(const T *image, const offpath::Planes &planes, int64_t pitch, int64_t begin, int64_t width,
                 int64_t stride, typename Format<T>::Panel *block) {
    using E = Entries<T>;
    constexpr int64_t lanes = Simd<offpath::Sum<T>>::lanes;
    const offpath::Images &images = planes.images;
    const int64_t step = planes.column_step * images.column_stride;
    for (int64_t p = 0; p < planes.phase_count; ++p) {
        const offpath::Phase &phase = planes.phases[p];
        auto *of_phase = block + p * images.channels * stride;
        for (int64_t c = 0; c < images.channels; ++c) {
            auto *to = of_phase + c * stride;
            E::clear(to, width);
            if (images.channel_stride == 1 && step != 1)
                continue;
            each_run(planes, phase, pitch, pitch, begin, width, [&](int64_t position, int64_t at, int64_t count) {
                const T *from = image + c * images.channel_stride + at;
                if (step == 1)
                    return E::copy(from, to + position, count);
                for (int64_t i = 0; i < count; ++i)
                    to[position + i] = E::one(from[i * step]);
            });
        }
        if (images.channel_stride != 1 || step == 1)
            continue;
        each_run(planes, phase, pitch, pitch, begin, width, [&](int64_t position, int64_t at, int64_t count) {
            for (int64_t c = 0; c < images.channels; c += lanes)
                for (int64_t i = 0; i < count; i += lanes) {
                    const int64_t n = smaller_of(count - i, lanes);
                    transpose_square<T>(image + at + i * step + c, step, n, smaller_of(images.channels - c, lanes),
                                        of_phase + c * stride + position + i, stride, n);
                }
        });
    }
}

// `rows` rows of a tile, all of one phase and from channel `channel` on, into the positions [begin, begin + count).
template <class T>
void write_phase(const offpath::Sum<T> *tile, int64_t tile_width, int64_t rows, T *image, const offpath::Planes &planes,
                 const offpath::Phase &phase, int64_t channel, const offpath::Positions &positions, int64_t begin,
                 int64_t count) {
    using S = Simd<offpath::Sum<T>>;
    constexpr int64_t lanes = S::lanes;
    const offpath::Images &images = planes.images;
    const int64_t step = planes.column_step * images.column_stride;
    T *to = image + channel * images.channel_stride;
    each_run(planes, phase, positions.pitch, positions.columns, begin, count,
             [&](int64_t position, int64_t at, int64_t pixels) {
                 for (int64_t i = 0; i < pixels; i += lanes) {
                     const int64_t n = smaller_of(pixels - i, lanes);
                     const offpath::Sum<T> *from = tile + position + i;
                     if (step == 1) {
                         for (int64_t r = 0; r < rows; ++r)
                             S::store_first(to + r * images.channel_stride + at + i,
                                            S::load_first(from + r * tile_width, n), n);
                     } else if (images.channel_stride == 1) {
                         for (int64_t r = 0; r < rows; r += lanes) {
                             const int64_t k = smaller_of(rows - r, lanes);
                             transpose_square<T>(from + r * tile_width, tile_width, k, n, to + at + i * step + r, step,
                                                 k);
                         }
                     } else {
                         for (int64_t r = 0; r < rows; ++r)
                             for (int64_t j = 0; j < n; ++j)
                                 S::store_first(to + r * images.channel_stride + at + (i + j) * step,
                                                S::load_first(from + r * tile_width + j, 1), 1);
                     }
                 }
             });
}

// The planes [plane_begin, plane_end), one row of the tile each.
template <class T>
void write_planes(const offpath::Sum<T> *tile, int64_t tile_width, int64_t plane_begin, int64_t plane_end, T *image,
                  const offpath::Planes &planes, const offpath::Positions &positions, int64_t begin, int64_t count) {
    const int64_t channels = planes.images.channels;
    for (int64_t plane = plane_begin; plane < plane_end;) {
        const int64_t phase = plane / channels, rows = smaller_of(plane_end, (phase + 1) * channels) - plane;
        write_phase<T>(tile + (plane - plane_begin) * tile_width, tile_width, rows, image, planes, planes.phases[phase],
                       plane % channels, positions, begin, count);
        plane += rows;
    }
}

} // namespace
