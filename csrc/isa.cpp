#include "isa.h"

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

extern "C" {
extern const offpath::KernelTable offpath_table_baseline;
#if defined(__x86_64__)
extern const offpath::KernelTable offpath_table_avx2;
extern const offpath::KernelTable offpath_table_avx512;
extern const offpath::KernelTable offpath_table_avx512bf16;
#endif
}

namespace offpath {
namespace {

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
const std::array all_isas = {
    Isa{&offpath_table_baseline, true},
#if defined(__x86_64__)
    Isa{&offpath_table_avx2, __builtin_cpu_supports("x86-64-v3") != 0},
    Isa{&offpath_table_avx512, __builtin_cpu_supports("x86-64-v4") != 0},
    // Products of pairs of bfloat16 and of four int8, and the expansion of 16-bit values and of bytes that their bitmap
    // products need. No processor has pairs of bfloat16 and the expansion without the other two.
    Isa{&offpath_table_avx512bf16,
        __builtin_cpu_supports("x86-64-v4") != 0 && __builtin_cpu_supports("avx512bf16") != 0 &&
            __builtin_cpu_supports("avx512vbmi") != 0 && __builtin_cpu_supports("avx512vbmi2") != 0 &&
            __builtin_cpu_supports("avx512vnni") != 0},
#endif
};

std::array<std::atomic<uint64_t>, all_isas.size()> call_counts{};

void check(int64_t index) {
    if (index < 0 || index >= static_cast<int64_t>(all_isas.size()))
        throw std::invalid_argument("no ISA has index " + std::to_string(index));
}

} // namespace

std::span<const Isa> isas() { return all_isas; }

const KernelTable &use_table(int64_t index) {
    check(index);
    if (!all_isas[index].runs_here)
        throw std::invalid_argument(std::string("this CPU cannot run ISA ") + all_isas[index].table->isa);
    call_counts[index].fetch_add(1, std::memory_order_relaxed);
    return *all_isas[index].table;
}

uint64_t calls(int64_t index) {
    check(index);
    return call_counts[index].load(std::memory_order_relaxed);
}

} // namespace offpath
