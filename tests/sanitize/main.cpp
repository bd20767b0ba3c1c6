// Runs every product on every ISA of this CPU, in every dtype, on one to three threads and from two callers at once,
// and checks each result. Built and run for each checker by `make sanitize`.
#include "backward.h"
#include "bitmap_backward.h"
#include "convolutions.h"
#include "digest.h"
#include "int8.h"
#include "isa.h"
#include "operands.h"
#include "rows.h"
#include "self_test.h"
#include "sparse_rows.h"

#include <string>
#include <thread>

using namespace offpath;

namespace {

// What a pattern is prepared into; shared by the callers.
struct Prepared {
    const ProductPlan plan, transposed_plan;
    const Tiles tiles;
    const BitMatrix bits;

    template <class T>
    Prepared(const Operands<T> &o, const Kernels<T> &kernels, int threads)
        : plan(o.pattern.csr(), o.pattern.columns, nullptr, kernels.layout, threads),
          transposed_plan(o.transpose.pattern.csr(), o.pattern.rows, o.transpose.permutation.data(), kernels.layout,
                          threads),
          tiles(o.pattern.csr(), o.pattern.columns, threads), bits(o.pattern.csr(), o.pattern.columns, threads) {}
};

// Runs all gradients at once into memory of their sizes, and checks each.
template <class T, class Run> void check_gradients(const Operands<T> &o, const std::string &way, const Run &run) {
    const bool exact = o.draw == Draw::small_integers;
    const GuardedArray<T> dx(o.dx.size()), dvalues(o.dvalues.size()), dbias(o.dbias.size());
    run(dx.data(), dvalues.data(), dbias.data());
    check("backward, dx" + way, dx, o.dx, exact);
    check("backward, dvalues" + way, dvalues, o.dvalues, exact);
    check("backward, dbias" + way, dbias, o.dbias, exact);
}

template <class T>
void check_backward(const Operands<T> &o, const Kernels<T> &kernels, const Prepared &prepared, const Matrix<T> &dy,
                    const Matrix<T> &x, int threads, const std::string &where) {
    for (const bool first : {true, false})
        for (const bool second : {true, false}) {
            const Ways ways = {first ? &prepared.transposed_plan : nullptr, second ? &prepared.tiles : nullptr,
                               &prepared.bits};
            check_gradients(o,
                            std::string(first ? " over a plan, " : " filled, ") + (second ? "tiled" : "filled") + where,
                            [&](T *dx, T *dvalues, T *dbias) {
                                backward<T>(kernels, ways, o.pattern.rows, o.pattern.columns, o.pattern.nnz(),
                                            o.values(), dy, x, o.batch, dx, false, dvalues, dbias, threads);
                            });
            check_gradients(
                o, std::string(first ? " filled, " : " over bits, ") + (second ? "filled" : "over bits") + where,
                [&](T *dx, T *dvalues, T *dbias) {
                    bitmap_backward<T>(kernels, prepared.bits, o.values(), dy, x, o.batch, first, second, dx, dvalues,
                                       dbias, threads);
                });
        }
}

template <class T>
void run_products(const Operands<T> &o, const Kernels<T> &kernels, const Prepared &prepared, int threads,
                  const std::string &where) {
    const Csr csr = o.pattern.csr();
    const int64_t columns = o.pattern.columns;
    const bool integers = o.draw == Draw::small_integers;
    const auto check_run = [&](const std::string &product, const std::vector<Sum64> &expected, bool exact,
                               const auto &run) {
        const GuardedArray<T> result(expected.size());
        run(result.data());
        check(product + ", " + where, result, expected, exact);
    };
    for (size_t i = 0; i < std::size(storages); ++i) {
        const Storage &storage = storages[i];
        const auto x = o.x[i].matrix(), dy = o.dy[i].matrix();
        const T *bias = storage.bias ? o.bias() : nullptr;
        const std::vector<Sum64> &y = storage.bias ? o.y_with_bias : o.y;
        const std::string stored = std::string(" ") + storage.name;
        check_run("spmm" + stored, y, integers,
                  [&](T *result) { spmm<T>(kernels, csr, columns, o.values(), bias, x, o.batch, result, threads); });
        check_run("planned_spmm" + stored, y, integers, [&](T *result) {
            planned_spmm<T>(kernels, prepared.plan, o.values(), bias, x, o.batch, result, false, threads);
        });
        check_run("planned_spmm of the transpose" + stored, o.dx, integers, [&](T *result) {
            planned_spmm<T>(kernels, prepared.transposed_plan, o.values(), nullptr, dy, o.batch, result, false,
                            threads);
        });
        check_run("bitmap_spmm" + stored, y, integers, [&](T *result) {
            bitmap_spmm<T>(kernels, prepared.bits, o.values(), bias, x, o.batch, result, threads);
        });
        check_run("bitmap_dx" + stored, o.dx, integers,
                  [&](T *result) { bitmap_dx<T>(kernels, prepared.bits, o.values(), dy, o.batch, result, threads); });
        check_run("bitmap_dvalues" + stored, o.dvalues, integers,
                  [&](T *result) { bitmap_dvalues<T>(kernels, prepared.bits, dy, x, o.batch, result, threads); });
        check_run("filled_spmm" + stored, y, integers, [&](T *result) {
            filled_spmm<T>(kernels, prepared.bits, {o.values(), {}}, bias, x, o.batch, result, false, threads);
        });
        check_run("filled_dx" + stored, o.dx, integers,
                  [&](T *result) { filled_dx<T>(kernels, prepared.bits, o.values(), dy, o.batch, result, threads); });
        check_run("filled_dvalues" + stored, o.dvalues, integers,
                  [&](T *result) { filled_dvalues<T>(kernels, prepared.bits, dy, x, o.batch, result, threads); });
        check_run("tiled_sddmm" + stored, o.dvalues, integers,
                  [&](T *result) { tiled_sddmm<T>(kernels, prepared.tiles, dy, x, o.batch, result, threads); });
        check_backward<T>(o, kernels, prepared, dy, x, threads, stored + ", " + where);
        check_run("sddmm" + stored, o.dvalues, integers,
                  [&](T *result) { sddmm<T>(kernels, csr, columns, dy, x, o.batch, result, threads); });
    }
    const GuardedArray<int32_t> of_bits(o.pattern.nnz());
    prepared.bits.write_columns(of_bits.data(), threads);
    check_run("spmm with the columns of bits", o.y, integers, [&](T *result) {
        spmm<T>(kernels, {csr.crow_indices, of_bits.data(), csr.rows}, columns, o.values(), nullptr, o.x[0].matrix(),
                o.batch, result, threads);
    });
    check_run("expand", o.expanded, true,
              [&](T *result) { expand<T>(kernels, prepared.bits, o.values(), result, threads); });
    check_run("compress", o.compressed, true,
              [&](T *result) { compress<T>(kernels, prepared.bits, o.dense(), result, threads); });
}

template <class T> void run_problem(const Problem &problem, Draw draw) {
    const Operands<T> operands(problem, draw);
    digest(operands.pattern.crow_indices.data(), operands.pattern.rows + 1, 0);
    digest(operands.pattern.col_indices.data(), operands.pattern.nnz(), 0);
    for (size_t isa = 0; isa < isas().size(); ++isa) {
        if (!isas()[isa].runs_here)
            continue;
        const Kernels<T> kernels = kernels_of<T>(use_table(static_cast<int64_t>(isa)));
        for (int threads = 1; threads <= 3; ++threads) {
            const std::string where = std::string(name_of<T>) + ", " + isas()[isa].table->isa + ", " +
                                      std::to_string(threads) + " threads: " + problem.name;
            const Prepared prepared(operands, kernels, threads);
            const auto run = [&] { run_products(operands, kernels, prepared, threads, where); };
            // Python lets go of its lock around a product, so two of its threads may be in here at once.
            std::thread other_caller;
            if (threads == 2)
                other_caller = std::thread(run);
            run();
            if (other_caller.joinable())
                other_caller.join();
        }
    }
}

} // namespace

int main(int count, char **arguments) {
    find_pool();
    if (count == 3 && std::string(arguments[1]) == "--self-test")
        return self_test(arguments[2]);
    const size_t every = count == 3 && std::string(arguments[1]) == "--every" ? std::stoul(arguments[2]) : 1;
    for (const Isa &isa : isas())
        std::cout << isa.table->isa << (isa.runs_here ? ": checked\n" : ": NOT CHECKED, this CPU cannot run it\n");
    check_all_convolutions();
    check_all_rows();
    check_all_sparse_rows();
    check_all_int8();
    const std::vector<Problem> all = problems();
    for (size_t i = 0; i < all.size(); i += every) {
        std::cout << '\r' << i + 1 << " of " << all.size() << " problems" << std::flush;
        // Each problem meets both kinds of operands, in one dtype or another.
        const Draw one = i % 2 ? Draw::gaussian : Draw::small_integers;
        const Draw other = i % 2 ? Draw::small_integers : Draw::gaussian;
        run_problem<float>(all[i], one);
        run_problem<double>(all[i], other);
        run_problem<bfloat16>(all[i], i / 2 % 2 ? one : other);
    }
    std::cout << ": every result is right" << std::endl;
}
