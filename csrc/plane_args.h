// The operands of the kernels of a convolution. A product never sees an image: what it reads of one is copied into
// blocks first, and there every convolution is one with stride 1 and without padding.
#pragma once

#include "plan_args.h"

namespace offpath {

// Images [channels, height, width] one behind the other, in any order of these dimensions; strides in entries.
struct Images {
    int64_t channels, height, width;
    int64_t image_stride, channel_stride, row_stride, column_stride;
};

// Every step-th pixel of a channel, from (first_row, first_column) on: a plane. What lies outside of the image is zero.
struct Phase {
    int64_t first_row, first_column;
};
struct Planes {
    Images images;
    const Phase *phases; // plane p is phase p / channels of channel p % channels
    int64_t phase_count, row_step, column_step;
};

// The pixels (h, w) of a plane in one line, at h * pitch + w. A tap is the same step along this line for every pixel:
// what stands between the end of a row and the pitch is padding, or means nothing.
struct Positions {
    int64_t rows, columns, pitch;
    int64_t count; // from the first pixel to the last: (rows - 1) * pitch + columns, or 0
};

// y[plane r, p] = bias[r] + sum over the connections of row r of value * (a plane of x)[p + tap], for a block of groups
// x panels of all images. The plan's columns are where a plane and a tap begin in the block of a panel.
template <class T> struct convolve_args {
    BucketPlan plan;
    const void *values; // in the plan's order
    const T *bias;      // [rows], or null for zero
    const T *x;
    Planes from;
    T *y;
    Planes to; // its planes are the plan's rows
    Positions positions;
    int64_t panels;       // of an image
    int64_t block_stride; // from plane to plane: as wide as a panel and as far as taps reach
    void *block;          // working memory: planes + 1 times block_stride, in the type of panels
};

// A strip is as many neighbouring positions of an image as the weight gradient keeps of one plane in registers.
//
// Copies strips of the planes into blocks; the block's batch counts strips of all images.
template <class T> struct pack_strips_args {
    const T *source;
    Planes planes;
    int64_t pitch, strips; // of an image
    int64_t block_stride;  // from plane to plane
    int64_t first_strip;   // the one whose block stands first
    void *blocks;          // [strips, planes, block_stride], in the type of panels
};

// sums[s] (+)= sum over p of dy[column of s, p] * x[row of s, p], for a block of tiles x strips of all images: the plan
// is of the transposed weight, whose rows are taps of x. Strip 0 starts the sums, the last one writes dvalues.
template <class T> struct strip_dots_args {
    TilePlan plan;
    const int32_t *row_begin;               // [plan.rows]: where plane and tap of a row begin in a block of x
    const void *x, *dy;                     // blocks, `first_strip` first
    int64_t x_block, dy_block, first_strip; // entries of a block
    int64_t positions, strips, all_strips;  // of an image, of an image, of all images
    Sum<T> *sums;                           // [nnz]
    T *dvalues;                             // [nnz], in the order of the transposed weight
};

} // namespace offpath
