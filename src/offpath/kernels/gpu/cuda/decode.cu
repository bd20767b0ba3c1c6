// y = x W^T + bias for one to eight tokens and a sparse W, one output row per warp. formats.py describes the weight.
//
// BATCH  tokens: 1, 2, 4 or 8; fewer may come, and the rest counts as zeros
// N4     1: columns as 16 bits per group and 4-bit gaps in units of STRIDE columns; 0: 16 bits per slot
// BF16   1: bfloat16 operands; 0: float32. Sums are float32 in both.
// STAGED 1: x waits in shared memory, [columns][BATCH]; 0: it is read from global memory, for x that does not fit
// DEPTH  groups that each lane has in flight
// WARPS  per block; BLOCKS: that many blocks should fit on a multiprocessor
// PREFETCH groups of a row that are fetched before the kernel before has ended

constexpr int GROUP = 8;
constexpr int THREADS = WARPS * 32;

#if BF16
constexpr int VALUE_WORDS = 4;
constexpr int X_WORDS = BATCH == 1 ? 1 : BATCH / 2; // one token waits as float32, two share a word
__device__ __forceinline__ bool is_finite(u16 value) { return (value & 0x7f80u) != 0x7f80u; }
#else
constexpr int VALUE_WORDS = 8;
constexpr int X_WORDS = BATCH;
__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }
#endif

constexpr int X_SHIFT = X_WORDS == 1 ? 2 : X_WORDS == 2 ? 3 : X_WORDS == 4 ? 4 : 5; // log2 of the bytes of a column
constexpr int GAP_SHIFT = X_SHIFT + (STRIDE == 32 ? 5 : STRIDE == 16 ? 4 : STRIDE == 8 ? 3 : 0);
constexpr int COLUMN_WORDS = N4 ? 2 : 4;

// Neighbouring rows go to different blocks, so that all blocks have about as many.
__device__ __forceinline__ int first_row() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void prefetch_bytes(const void *array, long long begin, int size) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"((const char *)array + begin), "r"(size) : "memory");
}

// The beginning of this warp's first row into the L2 cache, about: where it lies if all rows are equally long. Nothing
// is read, so it does not matter whether the kernel before still writes there.
__device__ __forceinline__ void prefetch(const uint4 *values, const u16 *columns, const u32 *gaps, int n_groups,
                                         int n_rows, int row) {
    const long long begin = (long long)n_groups * row / n_rows / 8 * 8;
    const int count = min(min((n_groups + n_rows - 1) / n_rows, PREFETCH), n_groups - (int)begin) / 8 * 8;
    if (row >= n_rows || count <= 0)
        return;
    const int lane = threadIdx.x % 32;
    if (lane == 0)
        prefetch_bytes(values, begin * VALUE_WORDS * 4, count * VALUE_WORDS * 4);
#if N4
    if (lane == 1)
        prefetch_bytes(columns, begin * 2, count * 2);
    if (lane == 2)
        prefetch_bytes(gaps, begin * 4, count * 4);
#else
    if (lane == 1)
        prefetch_bytes(columns, begin * 16, count * 16);
#endif
}
#endif

struct Group {
    u32 values[VALUE_WORDS];
    u32 columns[COLUMN_WORDS]; // N4: first column, gaps; else two columns a word
};

__device__ __forceinline__ void load_words(u32 *words, const uint4 *source) {
    const uint4 four = __ldcs(source);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
}

__device__ __forceinline__ Group load(const uint4 *values, const u16 *columns, const u32 *gaps, int group) {
    Group loaded;
    load_words(loaded.values, values + (long long)group * (VALUE_WORDS / 4));
#if !BF16
    load_words(loaded.values + 4, values + (long long)group * 2 + 1);
#endif
#if N4
    loaded.columns[0] = __ldcs(columns + group);
    loaded.columns[1] = __ldcs(gaps + group);
#else
    load_words(loaded.columns, (const uint4 *)columns + group);
#endif
    return loaded;
}

__device__ __forceinline__ float slot_value(const Group &group, int slot) {
#if BF16
    const u32 word = group.values[slot / 2];
    return __uint_as_float(slot % 2 ? word & 0xffff0000u : word << 16);
#else
    return __uint_as_float(group.values[slot]);
#endif
}

// A slot without a connection holds -0.0.
__device__ __forceinline__ bool is_filler(const Group &group, int slot) {
    return __float_as_uint(slot_value(group, slot)) == 0x80000000u;
}

// sums += value * x[column], x at `place` in shared memory.
__device__ __forceinline__ void accumulate_staged(float *sums, float value, const unsigned char *place) {
    u32 words[X_WORDS];
    if (X_WORDS == 1) {
        words[0] = *(const u32 *)place;
    } else if (X_WORDS == 2) {
        const uint2 two = *(const uint2 *)place;
        words[0] = two.x, words[X_WORDS - 1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < X_WORDS / 4; ++i) {
            const uint4 four = ((const uint4 *)place)[i];
            words[4 * i] = four.x, words[4 * i + 1 % X_WORDS] = four.y;
            words[4 * i + 2 % X_WORDS] = four.z, words[4 * i + 3 % X_WORDS] = four.w;
        }
    }
#pragma unroll
    for (int token = 0; token < BATCH; ++token) {
#if BF16 && BATCH > 1
        const u32 word = words[token / 2];
        sums[token] = fmaf(value, __uint_as_float(token % 2 ? word & 0xffff0000u : word << 16), sums[token]);
#else
        sums[token] = fmaf(value, __uint_as_float(words[token]), sums[token]);
#endif
    }
}

// GUARDED leaves out the slots without a connection, which would make NaN of an x that is not finite.
template <bool GUARDED>
__device__ __forceinline__ void accumulate(float *sums, const Group &group, const unsigned char *staged,
                                           const Element *x, int n_columns, int tokens) {
#if N4
    u32 place = group.columns[0] << X_SHIFT;
#endif
#pragma unroll
    for (int slot = 0; slot < GROUP; ++slot) {
#if N4
        // The gap in bytes; the ones that the gaps lack are added up in the constant below.
        const int shift = 4 * slot - GAP_SHIFT;
        const u32 gap =
            (shift < 0 ? group.columns[1] << -shift : group.columns[1] >> (shift < 0 ? 0 : shift)) & (15u << GAP_SHIFT);
        if (slot > 0)
            place += gap;
        const u32 offset = place + (slot << GAP_SHIFT);
#else
        const u32 word = group.columns[slot / 2];
        const u32 offset = (slot % 2 ? word >> 16 : word & 0xffffu) << X_SHIFT;
#endif
        if (GUARDED && is_filler(group, slot))
            continue;
        const float value = slot_value(group, slot);
#if STAGED
        accumulate_staged(sums, value, staged + offset);
#else
#pragma unroll
        for (int token = 0; token < BATCH; ++token) {
            if (token < tokens) {
                const Element *at = x + (long long)token * n_columns + (offset >> X_SHIFT);
                sums[token] = fmaf(value, widen(*at), sums[token]);
            }
        }
#endif
    }
}

template <bool GUARDED>
__device__ __forceinline__ void multiply(const uint4 *values, const u16 *columns, const u32 *gaps,
                                         const int *group_offsets, const Element *x, const Element *bias, Element *y,
                                         int n_rows, int n_columns, int tokens, const unsigned char *staged,
                                         Group *waiting, int begin, int end) {
    const int lane = threadIdx.x % 32;
    const int step = gridDim.x * WARPS;
    for (int row = first_row(); row < n_rows; row += step) {
        const int next_row = row + step;
        int next_begin = 0, next_end = 0;
        if (next_row < n_rows)
            next_begin = group_offsets[next_row], next_end = group_offsets[next_row + 1];
        float sums[BATCH];
#pragma unroll
        for (int token = 0; token < BATCH; ++token)
            sums[token] = 0.0f;
        int first = begin;
        for (; first + 32 * DEPTH < end; first += 32 * DEPTH) {
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                accumulate<GUARDED>(sums, waiting[i], staged, x, n_columns, tokens);
                const int group = first + 32 * (DEPTH + i) + lane;
                if (group < end)
                    waiting[i] = load(values, columns, gaps, group);
            }
        }
        // The end of this row, while the beginning of the next one is on its way.
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            if (first + 32 * i + lane < end)
                accumulate<GUARDED>(sums, waiting[i], staged, x, n_columns, tokens);
            const int group = next_begin + 32 * i + lane;
            if (group < next_end)
                waiting[i] = load(values, columns, gaps, group);
        }
        begin = next_begin, end = next_end;
#pragma unroll
        for (int token = 0; token < BATCH; ++token) {
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                sums[token] += __shfl_xor_sync(0xffffffffu, sums[token], distance);
            }
            if (lane == token && token < tokens) {
                y[(long long)token * n_rows + row] = narrow(sums[token] + (bias ? widen(bias[row]) : 0.0f));
            }
        }
    }
}

// Puts x into shared memory, [columns][BATCH], and tells whether anything in it is not finite.
__device__ __forceinline__ bool stage(unsigned char *staged, const Element *x, int n_columns, int tokens) {
    constexpr int AT_ONCE = BATCH < 8 ? 8 / BATCH : 1; // columns of a thread that are on their way together
    bool strange = false;
    for (int first = threadIdx.x; first < n_columns; first += AT_ONCE * THREADS) {
        Element elements[AT_ONCE][BATCH];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int token = 0; token < BATCH; ++token) {
                const int column = first + i * THREADS;
                const bool there = column < n_columns && token < tokens;
                elements[i][token] = there ? x[(long long)token * n_columns + column] : Element(0);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int column = first + i * THREADS;
            u32 *words = (u32 *)(staged + ((size_t)column << X_SHIFT));
#pragma unroll
            for (int word = 0; word < X_WORDS; ++word) {
                u32 bits = 0;
#pragma unroll
                for (int token = word * BATCH / X_WORDS; token < (word + 1) * BATCH / X_WORDS; ++token) {
                    strange |= !is_finite(elements[i][token]);
                    const u32 wide = __float_as_uint(widen(elements[i][token]));
                    bits |= BF16 && BATCH > 1 && token % 2 == 0 ? wide >> 16 : wide;
                }
                if (column < n_columns)
                    words[word] = bits;
            }
        }
    }
    // The last slots of a row may point a little past the last column.
    u32 *behind = (u32 *)(staged + ((size_t)n_columns << X_SHIFT));
    for (int word = threadIdx.x; word < GROUP * STRIDE * X_WORDS; word += THREADS)
        behind[word] = 0;
    return strange;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode(const uint4 *values, const u16 *columns, const u32 *gaps, const int *group_offsets, const Element *x,
           const Element *bias, Element *y, int n_rows, int n_columns, int tokens, int n_groups) {
    const int row = first_row();
#if __CUDA_ARCH__ >= 900
    prefetch(values, columns, gaps, n_groups, n_rows, row);
#endif
    wait_for_previous_kernel();
    start_next_kernel();
    int begin = 0, end = 0;
    if (row < n_rows)
        begin = group_offsets[row], end = group_offsets[row + 1];
    // The weights are on their way while x is staged.
    Group waiting[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const int group = begin + 32 * i + int(threadIdx.x) % 32;
        if (group < end)
            waiting[i] = load(values, columns, gaps, group);
    }
#if STAGED
    extern __shared__ uint4 shared[];
    unsigned char *staged = (unsigned char *)shared;
    const bool strange = stage(staged, x, n_columns, tokens);
    if (!__syncthreads_or(strange)) {
        multiply<false>(values, columns, gaps, group_offsets, x, bias, y, n_rows, n_columns, tokens, staged, waiting,
                        begin, end);
        return;
    }
#else
    const unsigned char *staged = nullptr;
#endif
    multiply<true>(values, columns, gaps, group_offsets, x, bias, y, n_rows, n_columns, tokens, staged, waiting, begin,
                   end);
}
