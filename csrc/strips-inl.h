// The weight gradient of a convolution. The roles of `tiled` are exchanged: what stays in registers is a plane of x at
// a tap, which begins anywhere, and what comes from the first-level cache is dy.
#pragma once

#include "planes-inl.h"
#include "tiled-inl.h"

namespace {

// Block: batch counts the strips of all images.
template <class T> void pack_strips(const offpath::pack_strips_args<T> &args, const offpath::Block &block) {
    using Panel = typename Format<T>::Panel;
    const int64_t planes = args.planes.phase_count * args.planes.images.channels;
    for (int64_t strip = block.batch_begin; strip < block.batch_end; ++strip)
        pack_planes<T>(args.source + strip / args.strips * args.planes.images.image_stride, args.planes, args.pitch,
                       strip % args.strips * strip_width<T>, args.block_stride, args.block_stride,
                       static_cast<Panel *>(args.blocks) + (strip - args.first_strip) * planes * args.block_stride);
}

template <class T, int64_t> struct RowsAtTaps {
    static constexpr int64_t column_width = strip_width<T>;
    const typename Format<T>::Panel *x;
    const int32_t *row_begin;
    const typename Format<T>::Panel *operator()(int32_t row) const { return x + row_begin[row]; }
};

// One tile times the first `vectors` vectors of a strip; dy has a full strip of each column.
template <class T, int vectors> void strip_tile(const offpath::strip_dots_args<T> &args, int64_t tile, int64_t strip) {
    using Panel = typename Format<T>::Panel;
    const int64_t block = strip - args.first_strip;
    const int64_t first_column = tile % args.plan.tiles_across * args.plan.tile_width;
    const TokenBlock<T, 1, vectors, RowsAtTaps> tokens = {
        {static_cast<const Panel *>(args.x) + block * args.x_block, args.row_begin},
        static_cast<const Panel *>(args.dy) + block * args.dy_block + first_column * strip_width<T>,
        0,
        0,
        strip == 0,
        strip == args.all_strips - 1,
        args.sums,
        args.dvalues};
    tokens.tile(args.plan, tile);
}

// Block: rows count tiles, batch the strips of all images.
template <class T> void strip_dots(const offpath::strip_dots_args<T> &args, const offpath::Block &block) {
    for (int64_t tile = block.row_begin; tile < block.row_end; ++tile)
        for (int64_t strip = block.batch_begin; strip < block.batch_end; ++strip) {
            const int64_t left = args.positions - strip % args.strips * strip_width<T>;
            switch (smaller_of(dy_vectors, (left + BatchVector<T>::tokens - 1) / BatchVector<T>::tokens)) {
            case 1:
                strip_tile<T, 1>(args, tile, strip);
                break;
            case 2:
                strip_tile<T, 2>(args, tile, strip);
                break;
            case 3:
                strip_tile<T, 3>(args, tile, strip);
                break;
            case 4:
                strip_tile<T, 4>(args, tile, strip);
                break;
            case 5:
            case 6:
                strip_tile<T, 6>(args, tile, strip);
                break;
            default:
                strip_tile<T, 8>(args, tile, strip);
            }
        }
}

} // namespace
