// y = bias + the sum over the parts of `partial` [parts][tokens][n_outputs], added up in their order and rounded once.
//
// BF16  1: bfloat16 y and bias; 0: float32
// WARPS per block

constexpr int THREADS = WARPS * 32;

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
