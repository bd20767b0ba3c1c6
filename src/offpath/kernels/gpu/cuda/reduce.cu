// y = bias + the sum over the parts of `partial` [parts][tokens][n_outputs], added up in their order and rounded once.
//
// BF16  1: bfloat16 y and bias; 0: float32
// WARPS per block
//
// Nothing is __restrict__: what is read may have been written by a kernel that still ran when this one started, so it
// must not come from the read-only cache.
//
// No header is included: nothing has to be found where this is compiled.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int THREADS = WARPS * 32;

#if BF16
typedef u16 Element;
__device__ __forceinline__ float widen(u16 value) { return __uint_as_float(u32(value) << 16); }
__device__ __forceinline__ u16 narrow(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return u16(bits >> 16 | 0x40u);
    return u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16); // to nearest, ties to even
}
#else
typedef float Element;
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float narrow(float value) { return value; }
#endif

// From compute capability 9.0 on, a kernel may start while the one before it in the stream still runs. What that one
// writes may be read, and what it reads may be written, only after the wait.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    reduce(const float *partial, const Element *bias, Element *y, int n_outputs, int tokens, int parts) {
    wait_for_previous_kernel();
    start_next_kernel();
    const long long place = (long long)blockIdx.x * THREADS + threadIdx.x;
    const long long count = (long long)tokens * n_outputs;
    if (place >= count)
        return;
    float sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < parts; ++part)
        sum += partial[part * count + place];
    y[place] = narrow(sum + (bias ? widen(bias[place % n_outputs]) : 0.0f));
}
