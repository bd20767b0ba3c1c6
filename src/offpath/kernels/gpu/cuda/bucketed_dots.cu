// dvalues[s] = <dy[row], x[column]> for the connections s of a sparse weight; dy [rows][tokens] and x [columns][tokens]
// lie by feature. A block has some connections of a region, a few rows and columns whose tokens it takes into shared
// memory, some at a time; each warp has a run of them, and adds up in registers. Connections come in twos of a row, so
// that its dy is read once for both. regions.py describes the weight.
//
// BF16  1: bfloat16 operands; 0: float32. Sums are float32 in both.
// WARPS per block; TWOS of a warp, an even number

constexpr int THREADS = WARPS * 32;
constexpr int ROW_BYTES = 256; // of a feature in shared memory
constexpr int PIECES = ROW_BYTES / 16;

constexpr int TOKENS = ROW_BYTES / sizeof(Element), LANE_TOKENS = TOKENS / 32, PIECE_TOKENS = TOKENS / PIECES;

// The tokens of a lane, of a feature that lies at `place`.
__device__ __forceinline__ void read(float *tokens, const unsigned char *place) {
    const uint2 two = *(const uint2 *)place;
#if BF16
    tokens[0] = __uint_as_float(two.x << 16), tokens[1] = __uint_as_float(two.x & 0xffff0000u);
    tokens[2] = __uint_as_float(two.y << 16), tokens[3] = __uint_as_float(two.y & 0xffff0000u);
#else
    tokens[0] = __uint_as_float(two.x), tokens[1] = __uint_as_float(two.y);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    bucketed_dots(const uint2 *twos, const int *slots, const int *corners, const int *begins, const Element *dy,
                  const Element *x, Element *dvalues, int n_rows, int n_columns, int side, int width) {
    extern __shared__ uint4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int buffer_bytes = 2 * side * ROW_BYTES;
    unsigned char *const staged = (unsigned char *)shared;
    uint2 *const staged_twos = (uint2 *)(staged + 2 * buffer_bytes);

    wait_for_previous_kernel();
    start_next_kernel();
    const int first_row = corners[2 * blockIdx.x], first_column = corners[2 * blockIdx.x + 1];
    const int begin = begins[blockIdx.x], count = begins[blockIdx.x + 1] - begin;
    // Each warp has as many twos, an even number; `mine` is not above zero where there are none left.
    const int share = (count + 2 * WARPS - 1) / (2 * WARPS) * 2, mine = min(share, count - warp * share);

    // A thread copies the same tokens of every feature: first of the columns of x, then of the rows of dy.
    static_assert(THREADS % PIECES == 0, "as many features in each turn");
    const int own_token = threadIdx.x % PIECES * PIECE_TOKENS, own_feature = threadIdx.x / PIECES;
    const auto stage = [&](int first_token) {
        const int token = first_token + own_token;
        const bool there = token < width;
        unsigned char *const staged_x = staged + first_token / TOKENS % 2 * buffer_bytes + threadIdx.x * 16;
        const auto copy = [&](unsigned char *to, const Element *from, int first, int count) {
            from += (long long)(first + own_feature) * width + (there ? token : 0);
            for (int feature = own_feature; feature < count; feature += THREADS / PIECES) {
                start_copy(to, from, there);
                to += THREADS * 16, from += (long long)(THREADS / PIECES) * width;
            }
        };
        copy(staged_x, x, first_column, min(side, n_columns - first_column));
        copy(staged_x + side * ROW_BYTES, dy, first_row, min(side, n_rows - first_row));
    };
    stage(0);
    for (int i = threadIdx.x; i < share * WARPS; i += THREADS)
        staged_twos[i] = i < count ? twos[begin + i] : uint2{0, 0};

    float sums[TWOS][2] = {};
    for (int first_token = 0; first_token < width; first_token += TOKENS) {
        wait_for_copies();
        __syncthreads();
        if (first_token + TOKENS < width)
            stage(first_token + TOKENS);
        const unsigned char *const lane_x = staged + first_token / TOKENS % 2 * buffer_bytes + lane * 8;
        const uint4 *const own = (const uint4 *)(staged_twos + warp * share);
#pragma unroll
        for (int i = 0; i < TWOS / 2; ++i) {
            if (2 * i < mine) {
                const uint4 both = own[i];
                const u32 columns[2] = {both.x, both.z}, rows[2] = {both.y, both.w};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float row[LANE_TOKENS], one[LANE_TOKENS], other[LANE_TOKENS];
                    read(row, lane_x + rows[j]);
                    read(one, lane_x + (columns[j] & 0xffffu));
                    read(other, lane_x + (columns[j] >> 16));
#pragma unroll
                    for (int token = 0; token < LANE_TOKENS; ++token) {
                        sums[2 * i + j][0] = fmaf(row[token], one[token], sums[2 * i + j][0]);
                        sums[2 * i + j][1] = fmaf(row[token], other[token], sums[2 * i + j][1]);
                    }
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < TWOS; ++i) {
        if (i >= mine)
            break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2)
                sums[i][j] += __shfl_xor_sync(0xffffffffu, sums[i][j], distance);
            const int slot = slots[2 * (begin + warp * share + i) + j];
            if (lane == 0 && slot >= 0)
                dvalues[slot] = narrow(sums[i][j]);
        }
    }
}
