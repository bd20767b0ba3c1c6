// Every product of a convolution, on small integers: exact in every order of summation.
#include "convolutions.h"

#include "convolution_products.h"
#include "everywhere.h"

#include <random>

using namespace offpath;

namespace {

struct ConvolutionCase {
    Convolution convolution;
    int64_t images;
    bool channels_last;
};
// One of each kind of tap, tails of every register, several panels and strips, rows that end a block.
constexpr ConvolutionCase cases[] = {
    {{1, 1, 1, {1, 1, 1, 0, 1, 1}, {1, 1, 1, 0, 1, 1}}, 1, false},
    {{5, 7, 1, {9, 3, 1, 1, 1, 9}, {11, 3, 1, 1, 1, 11}}, 2, false},
    {{5, 7, 1, {9, 3, 1, 1, 1, 9}, {11, 3, 1, 1, 1, 11}}, 2, true},
    {{20, 13, 1, {5, 1, 1, 0, 1, 5}, {9, 1, 1, 0, 1, 9}}, 3, false},
    {{4, 9, 1, {13, 3, 2, 1, 1, 7}, {10, 3, 2, 1, 1, 5}}, 2, false},
    {{4, 9, 1, {13, 3, 2, 1, 1, 7}, {10, 3, 2, 1, 1, 5}}, 2, true},
    {{6, 9, 3, {12, 3, 1, 2, 2, 12}, {15, 2, 3, 1, 3, 5}}, 1, false},
    {{3, 4, 1, {2, 5, 1, 2, 1, 2}, {3, 7, 1, 3, 1, 3}}, 1, true},
    {{33, 50, 1, {17, 3, 1, 1, 1, 17}, {18, 3, 1, 1, 1, 18}}, 2, false},
};

Images images_of(int64_t channels, int64_t height, int64_t width, bool channels_last) {
    if (channels_last)
        return {channels, height, width, channels * height * width, 1, width * channels, channels};
    return {channels, height, width, channels * height * width, height * width, width, 1};
}

int64_t pixel(const Images &images, int64_t image, int64_t channel, int64_t row, int64_t column) {
    return image * images.image_stride + channel * images.channel_stride + row * images.row_stride +
           column * images.column_stride;
}

template <class T> GuardedArray<T> integers(int64_t count, std::mt19937_64 &generator) {
    std::uniform_int_distribution<int> integer(-3, 3);
    std::vector<T> entries(count);
    for (T &entry : entries)
        entry = round_to<T>(integer(generator));
    return GuardedArray<T>::read_only(entries);
}

template <class T> void check_convolution(const ConvolutionCase &problem) {
    const Convolution &c = problem.convolution;
    std::mt19937_64 generator(3);
    std::bernoulli_distribution connected(0.3);
    const int64_t of_group = c.channels / c.groups, outputs_of_group = c.out_channels / c.groups;
    std::vector<int32_t> crow = {0}, col;
    for (int64_t o = 0; o < c.out_channels; ++o) {
        for (int64_t i = 0; i < of_group * c.taps(); ++i)
            if (connected(generator))
                col.push_back(static_cast<int32_t>(i));
        crow.push_back(static_cast<int32_t>(col.size()));
    }
    const Images in = images_of(c.channels, c.rows.size, c.columns.size, problem.channels_last);
    const Images out = images_of(c.out_channels, c.rows.outputs, c.columns.outputs, problem.channels_last);
    const auto x = integers<T>(problem.images * in.image_stride, generator);
    const auto dy = integers<T>(problem.images * out.image_stride, generator);
    const auto values = integers<T>(static_cast<int64_t>(col.size()), generator);
    const auto bias = integers<T>(c.out_channels, generator);
    std::vector<Sum64> y(dy.size()), dx(x.size()), dvalues(col.size());
    for (int64_t n = 0; n < problem.images; ++n)
        for (int64_t o = 0; o < c.out_channels; ++o)
            for (int64_t h = 0; h < c.rows.outputs; ++h)
                for (int64_t w = 0; w < c.columns.outputs; ++w) {
                    const int64_t at = pixel(out, n, o, h, w);
                    y[at].add(to_double(bias[o]));
                    for (int32_t s = crow[o]; s < crow[o + 1]; ++s) {
                        const int64_t channel = o / outputs_of_group * of_group + col[s] / c.taps();
                        const int64_t tap = col[s] % c.taps();
                        const int64_t row =
                            h * c.rows.stride + tap / c.columns.kernel * c.rows.dilation - c.rows.padding;
                        const int64_t column =
                            w * c.columns.stride + tap % c.columns.kernel * c.columns.dilation - c.columns.padding;
                        if (row < 0 || row >= in.height || column < 0 || column >= in.width)
                            continue;
                        const int64_t from = pixel(in, n, channel, row, column);
                        y[at].add(to_double(values[s]) * to_double(x[from]));
                        dx[from].add(to_double(values[s]) * to_double(dy[at]));
                        dvalues[s].add(to_double(dy[at]) * to_double(x[from]));
                    }
                }
    const auto own_crow = GuardedArray<int32_t>::read_only(crow), own_col = GuardedArray<int32_t>::read_only(col);
    const Csr weight{own_crow.data(), own_col.data(), c.out_channels};
    const std::string what = std::to_string(&problem - cases) + ". convolution";
    run_everywhere<T>(what, [&](const Kernels<T> &kernels, int threads, const std::string &where) {
        const GuardedArray<T> got_y(y.size()), got_dx(dx.size()), got_dvalues(dvalues.size());
        const ConvolutionPlan forward(weight, c, false, kernels.layout, threads);
        convolve<T>(kernels, forward, values.data(), bias.data(), x.data(), in, got_y.data(), out, problem.images,
                    threads);
        check("convolve, " + where, got_y, y, true);
        const ConvolutionPlan backward(weight, c, true, kernels.layout, threads);
        convolve<T>(kernels, backward, values.data(), nullptr, dy.data(), out, got_dx.data(), in, problem.images,
                    threads);
        check("the gradient of the input of a convolution, " + where, got_dx, dx, true);
        const ConvolutionTiles tiles(weight, c, kernels.layout, threads);
        convolution_dvalues<T>(kernels, tiles, dy.data(), out, x.data(), in, problem.images, got_dvalues.data(),
                               threads);
        check("the gradient of the values of a convolution, " + where, got_dvalues, dvalues, true);
    });
}

} // namespace

void check_all_convolutions() {
    for (const ConvolutionCase &problem : cases) {
        check_convolution<float>(problem);
        check_convolution<double>(problem);
        check_convolution<bfloat16>(problem);
    }
    std::cout << "convolutions: every result is right" << std::endl;
}
