// How fast threads read this machine's memory: the floor of a decoding step.
//
// Each thread walks its own part of a buffer far larger than the caches, as a decoding step walks
// the weights. From one or several places at a time, with and without software prefetch: which one
// wins differs between machines and hours, so all are tried and the best one counts.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gpt2fast {
namespace bandwidth {

typedef uint64_t Line __attribute__((vector_size(64)));

constexpr size_t huge_page = size_t{2} << 20;
constexpr size_t block = 4;   // lines read at one place before the next one has its turn
constexpr size_t ahead = 32;  // lines between a prefetch and its use

template <int places, bool prefetches>
uint64_t read(const Line* data, size_t lines) {
    const size_t part = lines / places / block * block;
    Line sums[block] = {};
    for (size_t i = 0; i < part; i += block) {
        for (int place = 0; place < places; ++place) {
            const Line* line = data + place * part + i;
            for (size_t k = 0; k < block; ++k) {
                if (prefetches) __builtin_prefetch(line + k + ahead);
                sums[k] += line[k];
            }
        }
    }
    const Line sum = sums[0] + sums[1] + sums[2] + sums[3];
    uint64_t total = 0;
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
    return total;
}

using Reader = uint64_t (*)(const Line* data, size_t lines);
constexpr Reader readers[] = {
    read<1, false>, read<1, true>, read<2, false>, read<2, true>,
    read<4, false>, read<4, true>, read<8, false>, read<8, true>,
};

// Returns when `threads` threads have called it; `calls` counts each one's own.
inline void meet(std::atomic<int>& arrivals, int threads, int& calls) {
    const int everybody = ++calls * threads;
    arrivals.fetch_add(1);
    while (arrivals.load() < everybody) std::this_thread::yield();
}

}  // namespace bandwidth

// Bytes per second of each of `repeats` passes over `bytes`, for the way of reading that has the
// best median; slowest first.
inline std::vector<double> read_bandwidth(int threads, size_t bytes, int repeats) {
    using namespace bandwidth;
    using Clock = std::chrono::steady_clock;
    const size_t part = bytes / threads / huge_page * huge_page;
    const size_t size = part * threads;
    // Prefetches run past the end.
    char* memory = static_cast<char*>(std::aligned_alloc(huge_page, size + huge_page));
    if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(memory, size + huge_page, MADV_HUGEPAGE);
#endif

    constexpr int ways = sizeof(readers) / sizeof(readers[0]);
    std::vector<std::vector<double>> speeds(ways, std::vector<double>(repeats));
    std::atomic<int> arrivals{0};
    std::atomic<uint64_t> sink{0};
    auto run = [&](int index) {
        char* mine = memory + part * index;
        std::fill(mine, mine + part, static_cast<char>(1));
        int calls = 0;
        for (int pass = 0; pass < ways * repeats; ++pass) {
            meet(arrivals, threads, calls);
            const Clock::time_point start = Clock::now();
            sink += readers[pass % ways](reinterpret_cast<const Line*>(mine), part / sizeof(Line));
            meet(arrivals, threads, calls);
            if (index == 0) {
                const std::chrono::duration<double> seconds = Clock::now() - start;
                speeds[pass % ways][pass / ways] = size / seconds.count();
            }
        }
    };
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index) others.emplace_back(run, index);
    run(0);
    for (std::thread& other : others) other.join();
    std::free(memory);

    for (std::vector<double>& way : speeds) std::sort(way.begin(), way.end());
    return *std::max_element(speeds.begin(), speeds.end(), [&](const auto& a, const auto& b) {
        return a[repeats / 2] < b[repeats / 2];
    });
}

}  // namespace gpt2fast
