// y = bias + W x for a sparse W and activations that lie by feature, x [columns][tokens]: a block has 256 rows of W and
// 128 tokens. It takes x into shared memory, as many columns at a time as fit, together with the connections of its
// rows to them, and adds up in registers. buckets.py describes W.
//
// BF16  1: bfloat16 x, y and bias; 0: float32. Values and sums are float32 in both.
// ROWS, WARPS of a block

constexpr int THREADS = WARPS * 32;
constexpr int ROWS_OF_WARP = ROWS / WARPS;
constexpr int LANE_TOKENS = 4, TOKENS = 32 * LANE_TOKENS;
static_assert(ROWS_OF_WARP < 32, "a lane has the end of each row");

constexpr int ROW_BYTES = TOKENS * sizeof(Element);
constexpr int PIECES = ROW_BYTES / 16, PIECE_TOKENS = 16 / sizeof(Element);

// sums += value * the lane's tokens of the column at `place`.
__device__ __forceinline__ void add(float *sums, const unsigned char *place, u32 value) {
    const float factor = __uint_as_float(value);
#if BF16
    const uint2 two = *(const uint2 *)place;
    const float x[LANE_TOKENS] = {__uint_as_float(two.x << 16), __uint_as_float(two.x & 0xffff0000u),
                                  __uint_as_float(two.y << 16), __uint_as_float(two.y & 0xffff0000u)};
#else
    const uint4 four = *(const uint4 *)place;
    const float x[LANE_TOKENS] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                                  __uint_as_float(four.w)};
#endif
#pragma unroll
    for (int i = 0; i < LANE_TOKENS; ++i)
        sums[i] = fmaf(factor, x[i], sums[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    bucketed_sum(const uint4 *pairs, const int *pair_offsets, const int *row_order, const Element *x,
                 const Element *bias, Element *y, int n_columns, int chunk_columns, int most_pairs, int width) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_token = blockIdx.y * TOKENS;
    const int n_chunks = (n_columns + chunk_columns - 1) / chunk_columns;
    const int x_bytes = (chunk_columns + 1) * ROW_BYTES; // of a buffer: fillers name a column more, which is zero
    unsigned char *const staged = (unsigned char *)shared;
    uint4 *const staged_pairs = (uint4 *)(staged + 2 * x_bytes);
    const int *const offsets = pair_offsets + (long long)blockIdx.x * n_chunks * ROWS;

    // A thread copies the same tokens of every column.
    static_assert(THREADS % PIECES == 0, "as many columns in each turn");
    const int own_token = first_token + threadIdx.x % PIECES * PIECE_TOKENS, own_column = threadIdx.x / PIECES;
    const bool there = own_token < width;
    const Element *const own_x = x + (long long)own_column * width + (there ? own_token : 0);
    const auto stage = [&](int chunk) {
        const int first = chunk * chunk_columns, count = min(chunk_columns, n_columns - first);
        unsigned char *to = staged + chunk % 2 * x_bytes + threadIdx.x * 16;
        const Element *from = own_x + (long long)first * width;
        for (int column = own_column; column < count; column += THREADS / PIECES) {
            start_copy(to, from, there);
            to += THREADS * 16, from += (long long)(THREADS / PIECES) * width;
        }
        const int begin = offsets[chunk * ROWS], end = offsets[chunk * ROWS + ROWS];
        for (int i = threadIdx.x; i < end - begin; i += THREADS)
            start_copy(staged_pairs + chunk % 2 * most_pairs + i, pairs + begin + i, true);
    };

    for (int i = threadIdx.x; i < 2 * PIECES; i += THREADS)
        *(uint4 *)(staged + i / PIECES * x_bytes + chunk_columns * ROW_BYTES + i % PIECES * 16) = uint4{0, 0, 0, 0};
    wait_for_previous_kernel();
    start_next_kernel();
    float sums[ROWS_OF_WARP][LANE_TOKENS] = {};
    // Where the pairs of the warp's rows begin in a chunk, in its first lanes; behind them, where they end.
    const int begins_at = warp * ROWS_OF_WARP + min(lane, ROWS_OF_WARP);
    int begins = 0;
    if (n_chunks > 0) {
        begins = offsets[begins_at] - offsets[0];
        stage(0);
    }
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
        wait_for_copies();
        __syncthreads();
        int next_begins = 0;
        if (chunk + 1 < n_chunks) {
            const int *const next = offsets + (chunk + 1) * ROWS;
            next_begins = next[begins_at] - next[0];
            stage(chunk + 1);
        }
        const unsigned char *const lane_x = staged + chunk % 2 * x_bytes + lane * (LANE_TOKENS * sizeof(Element));
        const uint4 *const chunk_pairs = staged_pairs + chunk % 2 * most_pairs;
        int begin = __shfl_sync(0xffffffffu, begins, 0);
#pragma unroll
        for (int row = 0; row < ROWS_OF_WARP; ++row) {
            const int end = __shfl_sync(0xffffffffu, begins, row + 1);
#pragma unroll 2
            for (int i = begin; i < end; ++i) {
                const uint4 pair = chunk_pairs[i];
                add(sums[row], lane_x + pair.x, pair.y);
                add(sums[row], lane_x + pair.z, pair.w);
            }
            begin = end;
        }
        begins = next_begins;
    }

    const int token = first_token + lane * LANE_TOKENS;
    if (token >= width)
        return;
#pragma unroll
    for (int i = 0; i < ROWS_OF_WARP; ++i) {
        const int row = row_order[(long long)blockIdx.x * ROWS + warp * ROWS_OF_WARP + i];
        if (row < 0)
            continue;
        const float added = bias ? widen(bias[row]) : 0.0f;
        Element results[LANE_TOKENS];
#pragma unroll
        for (int j = 0; j < LANE_TOKENS; ++j)
            results[j] = narrow(sums[i][j] + added);
        Element *const place = y + (long long)row * width + token;
#if BF16
        *(uint2 *)place = uint2{results[0] | u32(results[1]) << 16, results[2] | u32(results[3]) << 16};
#else
        *(uint4 *)place = uint4{__float_as_uint(results[0]), __float_as_uint(results[1]), __float_as_uint(results[2]),
                                __float_as_uint(results[3])};
#endif
    }
}
