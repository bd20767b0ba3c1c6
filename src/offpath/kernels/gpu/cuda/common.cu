// What every source begins with: nvrtc.py puts this before it. No header is included, and nothing has to be found where
// this is compiled.
//
// BF16 1: operands are bfloat16; 0: float32
//
// No kernel's argument is __restrict__: what is read may have been written by a kernel that still ran when this one
// started, so it must not come from the read-only cache.

typedef unsigned int u32;
typedef unsigned short u16;

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

#ifdef __CUDA_ARCH__
// 16 bytes into shared memory, on their way until this thread waits for all of its copies; zeros where `there` is none.
__device__ __forceinline__ void start_copy(void *to, const void *from, bool there) {
    const u32 place = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif
