#include "isa.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

extern "C" {
#if defined(__aarch64__)
extern const offpath::KernelTable offpath_table_neon;
extern const offpath::KernelTable offpath_table_neonbf16;
#else
extern const offpath::KernelTable offpath_table_baseline;
#endif
#if defined(__x86_64__)
extern const offpath::KernelTable offpath_table_avx2;
extern const offpath::KernelTable offpath_table_avx512;
extern const offpath::KernelTable offpath_table_avx512bf16;
#endif
#if defined(OFFPATH_AMX)
extern const offpath::AmxKernels offpath_table_avx512amx;
#endif
}

namespace offpath {
namespace {

#if defined(__aarch64__)
// Products of pairs of bfloat16, and of four int8 of which one operand has no sign.
bool multiplies_pairs() {
#if defined(__linux__)
    constexpr unsigned long i8mm = 1ul << 13, bf16 = 1ul << 14; // of the kernel's HWCAP2
    return (getauxval(AT_HWCAP2) & i8mm) && (getauxval(AT_HWCAP2) & bf16);
#elif defined(__APPLE__)
    const auto has = [](const char *name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return has("hw.optional.arm.FEAT_BF16") && has("hw.optional.arm.FEAT_I8MM");
#else
    return false;
#endif
}
#endif

#if defined(__x86_64__)
// Products of pairs of bfloat16 and of four int8, and the expansion of 16-bit values and of bytes that their bitmap
// products need. No processor has pairs of bfloat16 and the expansion without the other two.
bool multiplies_pairs() {
    return __builtin_cpu_supports("x86-64-v4") != 0 && __builtin_cpu_supports("avx512bf16") != 0 &&
           __builtin_cpu_supports("avx512vbmi") != 0 && __builtin_cpu_supports("avx512vbmi2") != 0 &&
           __builtin_cpu_supports("avx512vnni") != 0;
}
#endif

#if defined(OFFPATH_AMX)
// The kernels of pairs, and what tiles add to them.
const KernelTable table_avx512amx = [] {
    KernelTable table = offpath_table_avx512bf16;
    table.isa = "avx512amx";
    table.f32.amx = table.f64.amx = table.bf16.amx = &offpath_table_avx512amx;
    return table;
}();
#endif

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
const std::array all_isas = {
#if defined(__aarch64__)
    Isa{&offpath_table_neon, true},
    Isa{&offpath_table_neonbf16, multiplies_pairs()},
#else
    Isa{&offpath_table_baseline, true},
#endif
#if defined(__x86_64__)
    Isa{&offpath_table_avx2, __builtin_cpu_supports("x86-64-v3") != 0},
    Isa{&offpath_table_avx512, __builtin_cpu_supports("x86-64-v4") != 0},
    Isa{&offpath_table_avx512bf16, multiplies_pairs()},
#endif
#if defined(OFFPATH_AMX)
    Isa{&table_avx512amx, multiplies_pairs() && may_use_tiles()},
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
