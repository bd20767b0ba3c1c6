// A check on every ISA of this CPU, on one to three threads and from two callers at once.
#pragma once

#include "checks.h"
#include "isa.h"

#include <string>
#include <thread>

// Calls run(kernels, threads, where); `what` says in a report which operands were at hand.
template <class T, class Run> void run_everywhere(const std::string &what, const Run &run) {
    using namespace offpath;
    for (size_t isa = 0; isa < isas().size(); ++isa) {
        if (!isas()[isa].runs_here)
            continue;
        const Kernels<T> &kernels = kernels_of<T>(use_table(static_cast<int64_t>(isa)));
        for (int threads = 1; threads <= 3; ++threads) {
            const std::string where = std::string(name_of<T>) + ", " + isas()[isa].table->isa + ", " +
                                      std::to_string(threads) + " threads, " + what;
            const auto once = [&] { run(kernels, threads, where); };
            std::thread other_caller;
            if (threads == 2)
                other_caller = std::thread(once);
            once();
            if (other_caller.joinable())
                other_caller.join();
        }
    }
}
