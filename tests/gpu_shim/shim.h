// What the CUDA sources of src/offpath/kernels/gpu/cuda use of CUDA, on one thread of a CPU: each CUDA thread is a
// fiber, blocks run one after another, and shared memory beyond what a launch asked for is out of bounds. A barrier or
// a shuffle that not all threads reach ends the program, and so do blocks that write to the same place. Under
// ThreadSanitizer, the threads of a block are ordered by barriers alone: what they do not keep apart is a race.
//
// gpu_on_cpu.py puts the sources behind this, each with its options in a namespace of its own, and a main() that reads
// a launch from stdin and writes the buffers as they are afterwards to stdout.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <tuple>
#include <utility>
#include <vector>

// What the shim itself does to run the threads is nobody's race, and switching between them orders nothing.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char *, int);
extern "C" void AnnotateIgnoreReadsEnd(const char *, int);
extern "C" void AnnotateIgnoreWritesBegin(const char *, int);
extern "C" void AnnotateIgnoreWritesEnd(const char *, int);
extern "C" void __tsan_write_range(void *, size_t);
struct Unwatched {
    Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#else
struct Unwatched {
    Unwatched() {}
};
#define __tsan_acquire(...)
#define __tsan_release(...)
#define __tsan_write_range(...)
#define __tsan_get_current_fiber() nullptr
#define __tsan_create_fiber(...) nullptr
#define __tsan_destroy_fiber(...)
#define __tsan_switch_to_fiber(...)
#define __tsan_switch_to_fiber_no_sync 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_poison_memory_region(...)
#define __asan_unpoison_memory_region(...)
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static // gpu_on_cpu.py takes the declaration of `shared` away

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x, y;
};

constexpr int WARP = 32, STACK_BYTES = 1 << 16, SHARED_BYTES = 226 * 1024;
alignas(16) uint4 shared[SHARED_BYTES / sizeof(uint4)];
Index running, blockIdx, gridDim; // running: the thread
__attribute__((no_sanitize("thread"))) inline Index this_thread() { return running; }
#define threadIdx this_thread()

[[noreturn]] inline void fail(const char *problem) {
    fprintf(stderr, "shim: %s in block (%u, %u)\n", problem, blockIdx.x, blockIdx.y);
    exit(3);
}

// A barrier for `size` threads that also exchanges a word of each. Two rounds of words are kept: a thread can be at
// most one round ahead of another.
struct Meeting {
    int size, arrived = 0;
    unsigned round = 0;
    std::vector<unsigned> words[2];
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    bool done;
    void *thread; // what ThreadSanitizer calls it
};

struct Copy {
    void *to;
    const void *from;
    bool there;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<std::vector<Copy>> copies; // of each thread, that it has not waited for
std::vector<Meeting> warps;
Meeting block;
bool progress;
const void *scheduler_stack;
size_t scheduler_stack_bytes;
void *scheduler_thread;

inline void yield() {
    Fiber &fiber = fibers[threadIdx.x];
    const unsigned self = threadIdx.x;
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_stack_bytes);
    __tsan_switch_to_fiber(scheduler_thread, __tsan_switch_to_fiber_no_sync);
    swapcontext(&fiber.context, &scheduler);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
    running.x = self;
}

// The words of all threads of `meeting`, once all have come.
inline const std::vector<unsigned> &meet(Meeting &meeting, int place, unsigned word) {
    const Unwatched here;
    const unsigned round = meeting.round;
    meeting.words[round % 2][place] = word;
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.round;
        progress = true;
    }
    while (meeting.round == round)
        yield();
    return meeting.words[round % 2];
}

inline const std::vector<unsigned> &meet_warp(unsigned mask, unsigned word) {
    if (mask != 0xffffffffu)
        fail("a warp's function without all lanes");
    return meet(warps[threadIdx.x / WARP], threadIdx.x % WARP, word);
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> T __ldcs(const T *place) { return *place; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __shfl_sync(unsigned mask, int value, int lane) { return int(meet_warp(mask, unsigned(value))[lane]); }
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
    return __uint_as_float(meet_warp(mask, __float_as_uint(value))[(threadIdx.x % WARP) ^ distance]);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const std::vector<unsigned> &votes = meet_warp(mask, vote);
    unsigned ballot = 0;
    for (int lane = 0; lane < WARP; ++lane)
        ballot |= votes[lane] << lane;
    return ballot;
}
inline int __syncthreads_or(int vote) {
    unsigned any = 0;
    // A shuffle or a ballot does not order what is in memory: this does.
    std::vector<unsigned> *const round = &block.words[block.round % 2];
    __tsan_release(round);
    for (unsigned word : meet(block, threadIdx.x, vote != 0))
        any |= word;
    __tsan_acquire(round);
    return any != 0;
}
inline void __syncthreads() { __syncthreads_or(0); }

// sums [16][8] += a [16][16] b [16][8] as mma.m16n8k16 deals them to the lanes, the products added up in their order.
inline void multiply_on_tensor_cores(float *sums, const unsigned *a, const unsigned *b) {
    std::vector<unsigned> words[6];
    for (int i = 0; i < 6; ++i)
        words[i] = meet_warp(0xffffffffu, i < 4 ? a[i] : b[i - 4]);
    const auto number = [](unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); };
    const int lane = threadIdx.x % WARP;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned left = words[row / 8 + k / 8 * 2][row % 8 * 4 + k % 8 / 2];
            const unsigned right = words[4 + k / 8][column * 4 + k % 8 / 2];
            sums[i] = fmaf(number(left, k % 2), number(right, k % 2), sums[i]);
        }
    }
}

// A copy arrives as late as it may: when its thread waits for it. As it may also arrive at once, nobody may use the
// place when it starts.
inline void start_copy(void *to, const void *from, bool there) {
    __tsan_write_range(to, 16);
    const Unwatched here;
    copies[threadIdx.x].push_back({to, from, there});
}
inline void wait_for_copies() {
    for (const Copy &copy : copies[threadIdx.x]) {
        if (copy.there)
            *static_cast<uint4 *>(copy.to) = *static_cast<const uint4 *>(copy.from);
        else
            *static_cast<uint4 *>(copy.to) = uint4{0, 0, 0, 0};
    }
    copies[threadIdx.x].clear();
}

namespace shim {

template <class T> T take() {
    T value;
    if (fread(&value, sizeof value, 1, stdin) != 1)
        fail("a launch that ends too early");
    return value;
}

struct Buffer {
    size_t bytes = 0;
    void *memory = nullptr;
    std::vector<char> before, written; // as the last block found it; which bytes a block has changed
};
std::vector<Buffer> buffers;
std::vector<int> numbers;

// Arguments come in their order: a pointer as its bytes (none: a null pointer), an int as itself.
template <class T> T argument() {
    if constexpr (std::is_pointer_v<T>) {
        Buffer buffer;
        buffer.bytes = take<uint64_t>();
        if (buffer.bytes && posix_memalign(&buffer.memory, 16, buffer.bytes))
            fail("no memory");
        if (buffer.bytes && fread(buffer.memory, 1, buffer.bytes, stdin) != buffer.bytes)
            fail("a short buffer");
        const char *now = static_cast<const char *>(buffer.memory);
        buffer.before.assign(now, now + buffer.bytes), buffer.written.assign(buffer.bytes, 0);
        buffers.push_back(buffer);
        return static_cast<T>(buffer.memory);
    } else {
        return take<int>();
    }
}

void (*body)();

void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    const unsigned self = threadIdx.x;
    __tsan_acquire(&running);
    body();
    {
        const Unwatched here;
        fibers[self].done = progress = true;
    }
    __tsan_release(&scheduler);
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
    __tsan_switch_to_fiber(scheduler_thread, __tsan_switch_to_fiber_no_sync);
    setcontext(&scheduler);
}

// Each thread of a warp until it waits; whether all of them had come to their end before.
bool run_warp(int warp, bool backwards) {
    bool all_done = true;
    for (int i = 0; i < WARP; ++i) {
        running.x = warp * WARP + (backwards ? WARP - 1 - i : i);
        Fiber &fiber = fibers[running.x];
        if (fiber.done)
            continue;
        all_done = false;
        void *fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, fiber.stack.data(), STACK_BYTES);
        __tsan_switch_to_fiber(fiber.thread, __tsan_switch_to_fiber_no_sync);
        swapcontext(&scheduler, &fiber.context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    }
    return all_done;
}

void run_block(int threads, int shared_bytes, bool backwards) {
    for (int i = 0; i < SHARED_BYTES / 4; ++i)
        reinterpret_cast<unsigned *>(shared)[i] = 0xffffffffu; // NaN
    __asan_poison_memory_region(reinterpret_cast<char *>(shared) + shared_bytes, SHARED_BYTES - shared_bytes);
    for (Meeting &warp : warps)
        warp = {WARP, 0, 0, {std::vector<unsigned>(WARP), std::vector<unsigned>(WARP)}};
    block = {threads, 0, 0, {std::vector<unsigned>(threads), std::vector<unsigned>(threads)}};
    for (Fiber &fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.done = false;
        makecontext(&fiber.context, enter, 0);
    }
    __tsan_release(&running);
    // A warp runs on until it waits for another one: what is not kept in order by barriers comes out of order here.
    for (bool all_done = false; !all_done;) {
        all_done = true;
        bool any_progress = false;
        for (int i = 0; i < threads / WARP; ++i) {
            do {
                progress = false;
                all_done &= run_warp(backwards ? threads / WARP - 1 - i : i, backwards);
                any_progress |= progress;
            } while (progress);
        }
        if (!all_done && !any_progress)
            fail("a barrier that not all threads reach");
    }
    __tsan_acquire(&scheduler);
    __asan_unpoison_memory_region(shared, SHARED_BYTES);
    for (const std::vector<Copy> &left : copies) {
        if (!left.empty())
            fail("a copy that its thread does not wait for");
    }
}

// Blocks run at the same time, so that no two of them may write to the same place.
void note_writes() {
    for (Buffer &buffer : buffers) {
        const char *now = static_cast<const char *>(buffer.memory);
        for (size_t i = 0; i < buffer.bytes; ++i) {
            if (now[i] == buffer.before[i])
                continue;
            if (buffer.written[i])
                fail("a write to where another block has written");
            buffer.written[i] = 1;
        }
        buffer.before.assign(now, now + buffer.bytes);
    }
}

template <class... Arguments> int launch(void (*kernel)(Arguments...)) {
    const int grid_x = take<int>(), grid_y = take<int>(), threads = take<int>(), shared_bytes = take<int>();
    const bool backwards = take<int>();
    static std::tuple<Arguments...> arguments;
    static void (*function)(Arguments...);
    arguments = std::tuple<Arguments...>{argument<Arguments>()...};
    function = kernel;
    body = [] { std::apply(function, arguments); };
    const Unwatched here;
    scheduler_thread = __tsan_get_current_fiber();
    fibers.resize(threads);
    for (Fiber &fiber : fibers)
        fiber.thread = __tsan_create_fiber(0);
    copies.resize(threads);
    warps.resize(threads / WARP);
    gridDim = {unsigned(grid_x), unsigned(grid_y)};
    for (int i = 0; i < grid_x * grid_y; ++i) {
        const int at = backwards ? grid_x * grid_y - 1 - i : i;
        blockIdx = {unsigned(at % grid_x), unsigned(at / grid_x)};
        run_block(threads, shared_bytes, backwards);
        note_writes();
    }
    for (const Fiber &fiber : fibers)
        __tsan_destroy_fiber(fiber.thread);
    for (const Buffer &buffer : buffers) {
        if (buffer.bytes)
            fwrite(buffer.memory, 1, buffer.bytes, stdout);
        free(buffer.memory);
    }
    return 0;
}

} // namespace shim
