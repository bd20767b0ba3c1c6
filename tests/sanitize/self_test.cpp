#include "self_test.h"

#include "isa.h"
#include "operands.h"
#include "small_products.h"

#include <atomic>
#include <thread>

using namespace offpath;

namespace {

int64_t fastest_isa() {
    int64_t fastest = 0;
    for (size_t i = 0; i < isas().size(); ++i)
        if (isas()[i].runs_here)
            fastest = static_cast<int64_t>(i);
    return fastest;
}

} // namespace

int self_test(const std::string &mistake) {
    const Operands<float> o(random_problem(200, 300, 0.1, 150), Draw::gaussian);
    const BitMatrix bits(o.pattern.csr(), o.pattern.columns, 1);
    const auto plain = kernels_of<float>(use_table(0)), fastest = kernels_of<float>(use_table(fastest_isa()));
    const GuardedArray<float> y(o.y.size()), dense(o.expanded.size()), short_dense(o.expanded.size() - 1);
    const auto run_spmm = [&](const float *values, int threads) {
        spmm<float>(plain, o.pattern.csr(), o.pattern.columns, values, nullptr, o.x[0].matrix(), o.batch, y.data(),
                    threads);
    };
    if (mistake == "overrun") {
        expand<float>(plain, bits, o.values(), short_dense.data(), 1);
    } else if (mistake == "masked-overrun") { // a masked store, where this CPU has them
        expand<float>(fastest, bits, o.values(), short_dense.data(), 1);
    } else if (mistake == "underrun") {
        expand<float>(plain, bits, o.values(), dense.data() - 1, 1);
    } else if (mistake == "write-to-operand") {
        expand<float>(plain, bits, o.values(), const_cast<float *>(o.dense()), 1);
    } else if (mistake == "misaligned") {
        run_spmm(reinterpret_cast<const float *>(reinterpret_cast<const char *>(o.values()) + 1), 1);
    } else if (mistake == "wrong-result") {
        run_spmm(o.values(), 2);
        check("self-test", y, o.y_with_bias, false);
    } else if (mistake == "race") { // two callers, one output
        std::thread other([&] { run_spmm(o.values(), 1); });
        run_spmm(o.values(), 1);
        other.join();
    } else if (mistake == "race-of-the-pool") {
        int64_t sum = 0;
        std::atomic<int> entered{0};
        parallel_for(2, 2, [&](int64_t i) { // each thread takes one index; relaxed counting orders nothing else
            sum += i;
            entered.fetch_add(1, std::memory_order_relaxed);
            while (entered.load(std::memory_order_relaxed) < 2)
                std::this_thread::yield();
        });
    } else {
        return 2;
    }
    return 0;
}
