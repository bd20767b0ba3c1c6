// The entry point of libgomp that csrc/parallel.cpp looks up, made of std::thread. ThreadSanitizer knows how
// std::thread starts and joins; the barriers of libgomp, which is not compiled with it, it would report as races.
#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i)
        others.emplace_back(function, data);
    function(data);
    for (std::thread &other : others)
        other.join();
}
