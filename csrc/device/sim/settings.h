// Settings of a simulated run, and its counters.
//
// The environment chooses for whole programs, a test with use_settings() for itself:
//   GPT2FAST_SIM_ORDER   fifo (default), lifo, random: which of the threads that can run goes next,
//                        and which block
//   GPT2FAST_SIM_SEED    of the random order
//   GPT2FAST_SIM_ASYNC   deferred (default): an asynchronous copy arrives when it is waited for,
//                        until then its destination is NaN; immediate: it arrives at once
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

#include "error.h"

namespace gpt2fast::simulator {

enum class Order { fifo, lifo, random };
enum class Arrival { deferred, immediate };

struct Settings {
    Order order = Order::fifo;
    uint64_t seed = 0;
    Arrival async = Arrival::deferred;
};

// Counted over all launches since the last reset_statistics().
struct Statistics {
    uint64_t launches = 0;
    uint64_t blocks = 0;
    uint64_t switches = 0;  // from one CUDA thread to another
    uint64_t async_bytes = 0;
    uint64_t mma = 0;
    uint64_t wgmma = 0;
    uint64_t ldmatrix = 0;
    uint64_t ldmatrix_matrices = 0;
    // Passes over the banks that the matrices took: equal to their number without a conflict.
    uint64_t ldmatrix_passes = 0;

    void add(const Statistics& other) {
        launches += other.launches;
        blocks += other.blocks;
        switches += other.switches;
        async_bytes += other.async_bytes;
        mma += other.mma;
        wgmma += other.wgmma;
        ldmatrix += other.ldmatrix;
        ldmatrix_matrices += other.ldmatrix_matrices;
        ldmatrix_passes += other.ldmatrix_passes;
    }
};

inline Order parse_order(const std::string& name) {
    if (name == "fifo") return Order::fifo;
    if (name == "lifo") return Order::lifo;
    if (name == "random") return Order::random;
    throw Error("GPT2FAST_SIM_ORDER is fifo, lifo or random, not " + name);
}

inline Arrival parse_arrival(const std::string& name) {
    if (name == "deferred") return Arrival::deferred;
    if (name == "immediate") return Arrival::immediate;
    throw Error("GPT2FAST_SIM_ASYNC is deferred or immediate, not " + name);
}

inline Settings settings_of_environment() {
    Settings settings;
    if (const char* order = std::getenv("GPT2FAST_SIM_ORDER")) settings.order = parse_order(order);
    if (const char* seed = std::getenv("GPT2FAST_SIM_SEED")) {
        settings.seed = std::strtoull(seed, nullptr, 10);
    }
    if (const char* async = std::getenv("GPT2FAST_SIM_ASYNC")) {
        settings.async = parse_arrival(async);
    }
    return settings;
}

// Shared by all OS threads: torch runs backward passes on threads of its own.
struct Shared {
    std::mutex mutex;
    std::optional<Settings> settings;
    Statistics statistics;
};

inline Shared& shared_by_threads() {
    static Shared shared;
    return shared;
}

// nullopt: again what the environment says.
inline void use_settings(std::optional<Settings> settings) {
    std::lock_guard<std::mutex> lock(shared_by_threads().mutex);
    shared_by_threads().settings = settings;
}

inline Settings settings() {
    std::lock_guard<std::mutex> lock(shared_by_threads().mutex);
    const std::optional<Settings>& chosen = shared_by_threads().settings;
    return chosen ? *chosen : settings_of_environment();
}

inline Statistics statistics() {
    std::lock_guard<std::mutex> lock(shared_by_threads().mutex);
    return shared_by_threads().statistics;
}

inline void reset_statistics() {
    std::lock_guard<std::mutex> lock(shared_by_threads().mutex);
    shared_by_threads().statistics = Statistics{};
}

inline void add_statistics(const Statistics& of_launch) {
    std::lock_guard<std::mutex> lock(shared_by_threads().mutex);
    shared_by_threads().statistics.add(of_launch);
}

}  // namespace gpt2fast::simulator
