// y = x W + bias for one to four tokens and a dense W [n_inputs, n_outputs], of which only those rows are read whose
// input is not zero in every token. A block sums some inputs for a strip of outputs into `partial`; reduce.cu adds the
// blocks' sums up.
//
// BATCH tokens: 1, 2 or 4; fewer may come, and the rest counts as zeros
// BF16  1: bfloat16 operands; 0: float32. Sums are float32 in both.
// DEPTH rows that each warp has in flight; WARPS per block; BLOCKS: that many should fit on a multiprocessor

constexpr int THREADS = WARPS * 32;
constexpr int LIST = THREADS * 2; // inputs that are looked at before the rows of the live ones are read

#if BF16
constexpr int WIDTH = 8; // outputs in 16 bytes
#else
constexpr int WIDTH = 4;
#endif

constexpr int STRIP = 32 * WIDTH; // outputs of a block

__device__ __forceinline__ void add_row(float (*sums)[WIDTH], const uint4 &row, const float *x) {
    const u32 words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int token = 0; token < BATCH; ++token) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
#if BF16
            const float weight = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
            const float weight = __uint_as_float(words[i]);
#endif
            sums[token][i] = fmaf(x[token], weight, sums[token][i]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    live(const uint4 *weight, const Element *x, float *partial, int n_inputs, int n_outputs, int tokens,
         int inputs_per_block) {
    __shared__ int inputs[LIST];
    __shared__ float live_x[LIST][BATCH];
    __shared__ int counts[WARPS];
    __shared__ float sums_of_warps[WARPS][STRIP];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int output = blockIdx.x * STRIP + lane * WIDTH;
    const bool inside = output < n_outputs;
    const long long row_words = n_outputs / WIDTH;
    const uint4 *column = weight + output / WIDTH;
    const int begin = blockIdx.y * inputs_per_block;
    const int end = min(begin + inputs_per_block, n_inputs);

    wait_for_previous_kernel();
    start_next_kernel();

    float sums[BATCH][WIDTH];
#pragma unroll
    for (int token = 0; token < BATCH; ++token) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            sums[token][i] = 0.0f;
    }

    for (int first = begin; first < end; first += LIST) {
        int listed = 0;
        for (int part = first; part < min(first + LIST, end); part += THREADS) {
            const int input = part + int(threadIdx.x);
            float values[BATCH];
            bool is_live = false;
#pragma unroll
            for (int token = 0; token < BATCH; ++token) {
                const bool there = input < end && token < tokens;
                values[token] = there ? widen(x[(long long)token * n_inputs + input]) : 0.0f;
                is_live |= values[token] != 0.0f; // NaN is
            }
            const u32 lives = __ballot_sync(0xffffffffu, is_live);
            if (lane == 0)
                counts[warp] = __popc(lives);
            __syncthreads(); // and all warps are done with the list
            int place = listed + __popc(lives & ((1u << lane) - 1u));
#pragma unroll
            for (int other = 0; other < WARPS; ++other) {
                if (other < warp)
                    place += counts[other];
                listed += counts[other];
            }
            if (is_live) {
                inputs[place] = input;
#pragma unroll
                for (int token = 0; token < BATCH; ++token)
                    live_x[place][token] = values[token];
            }
            __syncthreads();
        }
        for (int entry = warp; entry < listed; entry += WARPS * DEPTH) {
            uint4 rows[DEPTH];
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int at = entry + i * WARPS;
                if (at < listed && inside)
                    rows[i] = __ldcs(column + inputs[at] * row_words);
            }
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int at = entry + i * WARPS;
                if (at < listed && inside)
                    add_row(sums, rows[i], live_x[at]);
            }
        }
    }

    for (int token = 0; token < tokens; ++token) {
#pragma unroll
        for (int other = 0; other < BATCH; ++other) {
            if (other == token) {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    sums_of_warps[warp][lane * WIDTH + i] = sums[other][i];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < STRIP && blockIdx.x * STRIP + i < n_outputs; i += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int other = 0; other < WARPS; ++other)
                sum += sums_of_warps[other][i];
            partial[((long long)blockIdx.y * tokens + token) * n_outputs + blockIdx.x * STRIP + i] = sum;
        }
        __syncthreads();
    }
}
