// Convolutions as the bucketed product: the columns of a block are planes shifted by taps, so that nothing is copied
// once per tap.
#pragma once

#include "bucketed-inl.h"
#include "planes-inl.h"

namespace {

// Where columns go in pairs, sums of zipped columns stand in the order of the zip; in order again.
template <class T> void order_sums([[maybe_unused]] offpath::Sum<T> *tile, [[maybe_unused]] int64_t entries) {
#ifdef OFFPATH_BFLOAT_PAIRS
    if constexpr (in_pairs<T>) {
        using S = Simd<float>;
        for (int64_t i = 0; i < entries; i += 2 * S::lanes) {
            const S::V low = S::load(tile + i), high = S::load(tile + i + S::lanes);
            S::store(tile + i, BfloatPairs::unzip_low(low, high));
            S::store(tile + i + S::lanes, BfloatPairs::unzip_high(low, high));
        }
    }
#endif
}

// The groups of the block times one panel of an image, which is packed already.
template <class T, int vectors>
void convolve_panel(const offpath::convolve_args<T> &args, const offpath::Block &block, int64_t image, int64_t begin,
                    int64_t count) {
    constexpr int64_t width = vectors * Simd<offpath::Sum<T>>::lanes;
    alignas(64) offpath::Sum<T> tile[tile_rows * width];
    for (int64_t group = block.row_begin; group < block.row_end; group += offpath::tile_groups) {
        const int64_t end = smaller_of(block.row_end, group + offpath::tile_groups);
        for (int64_t g = group; g < end; ++g) {
            const GroupStart<T> start(args.bias, g, args.plan.rows);
            offpath::Sum<T> *sums = tile + (g - group) * offpath::group_rows * width;
            bucketed_group<Multiplied<T>, vectors, 1>(args.plan, args.values, g,
                                                      static_cast<const typename Format<T>::Panel *>(args.block),
                                                      start.of_row, sums);
            order_sums<T>(sums, offpath::group_rows * width);
        }
        write_planes<T>(tile, width, group * offpath::group_rows, smaller_of(args.plan.rows, end * offpath::group_rows),
                        args.y + image * args.to.images.image_stride, args.to, args.positions, begin, count);
    }
}

// Where a panel of an image begins: panels are about as wide as one another.
template <class T> int64_t panel_begin(const offpath::convolve_args<T> &args, int64_t panel) {
    constexpr int64_t granule = Format<T>::granule;
    return smaller_of(args.positions.count,
                      (panel * args.positions.count + args.panels * granule - 1) / (args.panels * granule) * granule);
}

// Block: rows count groups, batch counts the panels of all images.
template <class T> void convolve(const offpath::convolve_args<T> &args, const offpath::Block &block) {
    using Panel = typename Format<T>::Panel;
    const int64_t planes = args.from.phase_count * args.from.images.channels;
    auto *packed = static_cast<Panel *>(args.block);
    if (in_pairs<T>)
        Entries<T>::clear(packed + planes * args.block_stride, args.block_stride);
    for (int64_t panel = block.batch_begin; panel < block.batch_end; ++panel) {
        const int64_t image = panel / args.panels, of_image = panel % args.panels;
        const int64_t begin = panel_begin<T>(args, of_image), count = panel_begin<T>(args, of_image + 1) - begin;
        // Zipped columns need both halves of their last register.
        const int64_t width = width_of_panel<T>(0, count);
        pack_planes<T>(args.x + image * args.from.images.image_stride, args.from, args.positions.pitch, begin,
                       width + args.block_stride - panel_width<T>, args.block_stride, packed);
        with_vectors_of_panel<T>(0, width, [&]<int vectors>(Vectors<vectors>) {
            if constexpr (!in_pairs<T> || vectors % 2 == 0)
                convolve_panel<T, vectors>(args, block, image, begin, count);
        });
    }
}

} // namespace
