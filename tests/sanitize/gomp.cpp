// The entry points of libgomp that csrc/parallel.cpp looks up, made of std::thread. ThreadSanitizer knows how
// std::thread starts and joins; the barriers of libgomp, which is not compiled with it, it would report as races.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0;
}

extern "C" int omp_get_thread_num() { return number; }

extern "C" void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back([=] {
            number = static_cast<int>(i);
            function(data);
        });
    function(data);
    for (std::thread &other : others)
        other.join();
}
