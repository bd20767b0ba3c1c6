// Which variants were built, and which of them this CPU and operating system can run.
#pragma once

#include "table.h"

#include <cstdint>
#include <span>

namespace offpath {

struct Isa {
    const KernelTable *table;
    bool runs_here;
};

// Slowest first; the first always runs.
std::span<const Isa> isas();

// The table at `index` of isas(), counted as called once more. Throws std::invalid_argument when there is no such
// index or the CPU cannot run it.
const KernelTable &use_table(int64_t index);

// Whether this process may use the tile registers of AMX, for which it asks the system.
bool may_use_tiles();

// How often use_table(index) was called: lets a test that forced a variant see that no other one ran.
uint64_t calls(int64_t index);

} // namespace offpath
