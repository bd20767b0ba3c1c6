// Up to 64 tokens times a sparse W on tensor cores. Each tile of W is written out in shared memory, from where the
// tensor cores take it as if it were dense (Xia et al., "Flash-LLM", VLDB 2024): only what is not zero comes from
// memory. tiles.py describes W, and where in shared memory its connections are written. A block sums some tiles of 64
// rows into `partial` [parts][tokens][n_rows]; reduce.cu adds the parts up.
//
// BF16   1
// TOKENS 8, 16, 32 or 64; fewer may come
// TILE_ROWS, TILE_COLUMNS, STRIDE as in tiles.py
// DEPTH  groups that each thread has in flight
// WARPS  per block, an even number; BLOCKS: that many blocks should fit on a multiprocessor

constexpr int GROUP = 8;
constexpr int THREADS = WARPS * 32;
constexpr int TILE_BYTES = TILE_ROWS * TILE_COLUMNS * 2;
constexpr int BUFFER_BYTES = TILE_BYTES + GROUP * STRIDE * 2; // the last slots may lie a little behind the tile
constexpr int CHUNKS = TILE_COLUMNS / 8;                      // 16 bytes of a token's x
constexpr int X_ROW_BYTES = TILE_COLUMNS * 2 + 64;            // so that eight lanes read eight different banks
constexpr int RUNS = TILE_COLUMNS / 32;                       // what a lane reads of x at once
constexpr int PARTS = WARPS / 2;                              // half of the warps have the upper rows, half the lower
constexpr int GAP_SHIFT = 7;                                  // log2 of the bytes of a unit
static_assert(STRIDE * 2 == 1 << GAP_SHIFT && TILE_ROWS == 64 && RUNS % PARTS == 0, "see tiles.py");

#ifdef __CUDA_ARCH__
// sums [16][8] += a [16][16] b [16][8], of which each lane has some.
__device__ __forceinline__ void multiply_on_tensor_cores(float *sums, const u32 *a, const u32 *b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

struct Group {
    u32 values[4];
    u32 first, gaps;
};

__device__ __forceinline__ Group load(const uint4 *values, const u16 *places, const u32 *gaps, int group) {
    const uint4 four = __ldcs(values + group);
    return {{four.x, four.y, four.z, four.w}, __ldcs(places + group), __ldcs(gaps + group)};
}

__device__ __forceinline__ void write_out(unsigned char *tile, const Group &group) {
    u32 place = group.first * 2;
#pragma unroll
    for (int slot = 0; slot < GROUP; ++slot) {
        // The gap in bytes; the ones that the gaps lack are added up in the constant below.
        const int shift = 4 * slot - GAP_SHIFT;
        const u32 gap = (shift < 0 ? group.gaps << -shift : group.gaps >> (shift < 0 ? 0 : shift)) & 15u << GAP_SHIFT;
        if (slot > 0)
            place += gap;
        const u32 word = group.values[slot / 2];
        *(u16 *)(tile + place + (slot << GAP_SHIFT)) = u16(slot % 2 ? word >> 16 : word);
    }
}

// A tile whose first groups are waiting, while the first ones of the next tile, which follow them, are on their way.
__device__ __forceinline__ void write_out_tile(unsigned char *tile, Group *waiting, const uint4 *values,
                                               const u16 *places, const u32 *gaps, int begin, int end, int next_end) {
    const int self = threadIdx.x;
    int first = begin;
    for (; first + THREADS * DEPTH < end; first += THREADS * DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            write_out(tile, waiting[i]);
            const int group = first + THREADS * (DEPTH + i) + self;
            if (group < end)
                waiting[i] = load(values, places, gaps, group);
        }
    }
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        if (first + THREADS * i + self < end)
            write_out(tile, waiting[i]);
        const int group = end + THREADS * i + self;
        if (group < next_end)
            waiting[i] = load(values, places, gaps, group);
    }
}

// The x of a tile's columns into shared memory, [TOKENS][TILE_COLUMNS]. What tokens hold that there are none of does
// not matter: their sums are not written.
__device__ __forceinline__ void stage(unsigned char *staged, const uint4 *x, int tile, int n_chunks, int tokens) {
    static_assert(CHUNKS == 32 && TOKENS % WARPS == 0, "a warp copies whole tokens");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = tile * CHUNKS + lane;
    const bool there = chunk < n_chunks;
    staged += warp * X_ROW_BYTES + lane * 16;
#pragma unroll
    for (int token = 0; token < TOKENS; token += WARPS) {
        if (warp + token < tokens)
            start_copy(staged + token * X_ROW_BYTES, x + (warp + token) * n_chunks + (there ? chunk : 0), there);
    }
}

// sums += this warp's part of tile * x. What is read of the tile becomes zero, ready for the next one.
__device__ __forceinline__ void multiply(float (*sums)[TOKENS / 8][4], unsigned char *tile,
                                         const unsigned char *staged) {
    const int lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2, part = threadIdx.x / 64;
#pragma unroll
    for (int i = 0; i < RUNS / PARTS; ++i) {
        const int run = i * PARTS + part;
        u32 a[2][2][4];
#pragma unroll
        for (int fragment = 0; fragment < 2; ++fragment) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                uint4 *place = (uint4 *)tile + (((half * 2 + fragment) * RUNS + run) * 2 + step) * 32 + lane;
                const uint4 four = *place;
                *place = uint4{0, 0, 0, 0};
                u32 *words = a[fragment][step];
                words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
            }
        }
#pragma unroll
        for (int eight = 0; eight < TOKENS / 8; ++eight) {
            const uint4 four =
                *(const uint4 *)(staged + (eight * 8 + lane / 4) * X_ROW_BYTES + run * 64 + lane % 4 * 16);
            const u32 b[2][2] = {{four.x, four.y}, {four.z, four.w}};
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int fragment = 0; fragment < 2; ++fragment)
                    multiply_on_tensor_cores(sums[fragment][eight], a[fragment][step], b[step]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multiply_tiles(const uint4 *values, const u16 *places, const u32 *gaps, const int *group_offsets, const uint4 *x,
                   float *partial, int n_rows, int n_chunks, int tokens) {
    extern __shared__ uint4 shared[];
    unsigned char *const tiles = (unsigned char *)shared, *const staged = tiles + 2 * BUFFER_BYTES;
    constexpr int X_BYTES = TOKENS * X_ROW_BYTES;
    const int n_tiles = (n_chunks + CHUNKS - 1) / CHUNKS;
    const int first = n_tiles * blockIdx.y / gridDim.y, last = n_tiles * (blockIdx.y + 1) / gridDim.y;
    const int tiles_above = blockIdx.x * n_tiles;

    for (int i = threadIdx.x; i < 2 * BUFFER_BYTES / 16; i += THREADS)
        shared[i] = uint4{0, 0, 0, 0};
    wait_for_previous_kernel();
    start_next_kernel();
    int begin = group_offsets[tiles_above + first], end = group_offsets[tiles_above + first + 1];
    int after = first + 1 < last ? group_offsets[tiles_above + first + 2] : end;
    Group waiting[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const int group = begin + THREADS * i + int(threadIdx.x);
        if (group < end)
            waiting[i] = load(values, places, gaps, group);
    }
    stage(staged, x, first, n_chunks, tokens);
    __syncthreads();

    float sums[2][TOKENS / 8][4] = {};
    // While a tile is multiplied, the next one is written out beside it.
    for (int tile = first - 1; tile < last; ++tile) {
        const int next = tile + 1;
        if (next < last) {
            if (next > first)
                stage(staged + (next - first) % 2 * X_BYTES, x, next, n_chunks, tokens);
            const int next_end = after;
            after = next + 2 < last ? group_offsets[tiles_above + next + 3] : next_end;
            write_out_tile(tiles + (next - first) % 2 * BUFFER_BYTES, waiting, values, places, gaps, begin, end,
                           next_end);
            begin = end, end = next_end;
        }
        if (tile >= first)
            multiply(sums, tiles + (tile - first) % 2 * BUFFER_BYTES, staged + (tile - first) % 2 * X_BYTES);
        wait_for_copies();
        __syncthreads();
    }

    // The tile buffers and x have been read: the warps' sums may take their place, [PARTS][TOKENS][TILE_ROWS].
    float *const sums_of_warps = (float *)shared;
    const int lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2, part = threadIdx.x / 64;
#pragma unroll
    for (int fragment = 0; fragment < 2; ++fragment) {
#pragma unroll
        for (int eight = 0; eight < TOKENS / 8; ++eight) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = half * 32 + fragment * 16 + i / 2 * 8 + lane / 4,
                          token = eight * 8 + lane % 4 * 2 + i % 2;
                sums_of_warps[(part * TOKENS + token) * TILE_ROWS + row] = sums[fragment][eight][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * TILE_ROWS; i += THREADS) {
        const int token = i / TILE_ROWS, row = blockIdx.x * TILE_ROWS + i % TILE_ROWS;
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < PARTS; ++other)
            sum += sums_of_warps[other * TOKENS * TILE_ROWS + i];
        if (row < n_rows)
            partial[((long long)blockIdx.y * tokens + token) * n_rows + row] = sum;
    }
}
