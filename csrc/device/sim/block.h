// One block of CUDA threads: who runs, who waits for what, and its barriers.
//
// A block runs on the OS thread that launched it, one CUDA thread at a time, and changes from one
// to the next only where a thread waits. Blocks run one after another.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "async_copies.h"
#include "cuda_types.h"
#include "error.h"
#include "fiber.h"
#include "sanitizers.h"
#include "settings.h"

namespace gpt2fast::simulator {

constexpr int warp_size = 32;
constexpr int max_threads = 1024;

enum class State : uint8_t { ready, waiting, done };

struct Thread {
    Fiber* fiber = nullptr;
    uint3 index{};
    int linear = 0;
    State state = State::done;
    const char* waits_for = "";  // while waiting
    Site site{"", 0};            // while waiting
    AsyncCopies copies;

    int lane() const { return linear % warp_size; }
    int warp() const { return linear / warp_size; }
};

// The threads that can run, each once at most.
class Queue {
public:
    void clear() { size_ = 0; }
    bool empty() const { return size_ == 0; }
    void push(Thread* thread) {
        at(size_) = thread;
        ++size_;
    }
    Thread* pop_first() {
        Thread* first = at(0);
        begin_ = (begin_ + 1) % max_threads;
        --size_;
        return first;
    }
    Thread* pop_last() { return at(--size_); }
    Thread* pop(size_t i) {
        std::swap(at(i), at(size_ - 1));
        return pop_last();
    }
    size_t size() const { return size_; }

private:
    Thread*& at(size_t i) { return threads_[(begin_ + i) % max_threads]; }

    std::array<Thread*, max_threads> threads_;
    size_t begin_ = 0;
    size_t size_ = 0;
};

// xorshift64* (Vigna, 2014): any seed gives the same order on every machine.
class Random {
public:
    explicit Random(uint64_t seed = 0) : state_(0x9E3779B97F4A7C15ull * (2 * seed + 1)) {}
    size_t below(size_t n) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<size_t>((state_ * 0x2545F4914F6CDD1Dull) >> 33) % n;
    }

private:
    uint64_t state_;
};

struct Barrier {
    int arrived = 0;
    int expected = 0;
    unsigned phase = 0;
    Site site{"", 0};
    std::vector<Thread*> waiting;
    std::array<uint32_t, max_threads / warp_size> lanes{};  // of each warp, arrived
    // Two that alternate: who leaves one phase doesn't see who arrived early at the next.
    std::array<Clock, 2> clocks;
};

using Slots = std::array<void*, warp_size>;

// An operation of the lanes of a mask, while some have still to arrive.
struct WarpOperation {
    const char* name;
    const void* type;  // of what each lane brings
    uint32_t mask;
    uint32_t arrived;
    Site site;
    bool whole_warp;  // no lane may have exited
    Slots slots;
    void (*work)(const Slots& slots, uint32_t lanes);
};

struct Warp {
    uint32_t exited = 0;  // and lanes that a block of a part of a warp never had
    std::vector<WarpOperation> pending;
    unsigned phase = 0;  // of __syncwarp
    std::array<Clock, 2> clocks;
};

// State that only some kernels use (mbarriers and wgmma).
struct Extension {
    virtual ~Extension() = default;
    // Empty, or what the block left undone when it ended.
    virtual std::string unfinished() const = 0;
};

struct Block {
    // Of the launch.
    dim3 grid, size;
    uint3 index{};
    int threads = 0;
    size_t shared_bytes = 0;
    Settings settings;
    void (*body)(void*) = nullptr;
    void* body_argument = nullptr;
    Clock start, end;
    Random random;
    Statistics statistics;

    // Of the block.
    unsigned char* shared = nullptr;
    std::vector<Thread> thread;
    std::vector<Warp> warps;
    std::vector<Barrier> barriers;
    std::unique_ptr<Extension> extension;
    int live = 0;
    Queue ready;
    Thread* running = nullptr;
    std::string error;

    Fiber host;
    std::vector<std::unique_ptr<Fiber>> fibers;

    Thread* next();
    void wake(Thread* woken) {
        woken->state = State::ready;
        ready.push(woken);
    }
    void wait(const char* what, const Site& site);
    void yield();
    void run(Thread* other) {
        Fiber& left = *running->fiber;
        running = other;
        ++statistics.switches;
        left.switch_to(*other->fiber);
    }
    std::string deadlock() const;
};

inline thread_local Block* current_block = nullptr;

GPT2FAST_NO_TSAN inline Block& block() { return *current_block; }
GPT2FAST_NO_TSAN inline Thread& thread() { return *current_block->running; }

inline std::string to_string(const uint3& index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
           std::to_string(index.z) + ")";
}

[[noreturn]] inline void fail(const std::string& what, const Site& site) {
    throw Error(to_string(site) + ": " + what + " [block " + to_string(block().index) + " thread " +
                to_string(thread().index) + "]");
}

GPT2FAST_NO_TSAN inline Thread* Block::next() {
    if (ready.empty()) return nullptr;
    switch (settings.order) {
        case Order::fifo: return ready.pop_first();
        case Order::lifo: return ready.pop_last();
        case Order::random: return ready.pop(random.below(ready.size()));
    }
    return nullptr;
}

inline std::string Block::deadlock() const {
    std::map<std::string, std::pair<int, const Thread*>> places;
    for (const Thread& each : thread) {
        if (each.state != State::waiting) continue;
        auto& [count, first] = places[std::string(each.waits_for) + " at " + to_string(each.site)];
        if (count++ == 0) first = &each;
    }
    std::string message = "deadlock in block " + to_string(index) + ":";
    for (const auto& [place, who] : places) {
        message += " " + std::to_string(who.first) + " threads wait in " + place + " (first " +
                   to_string(who.second->index) + ");";
    }
    return message + " " + std::to_string(threads - live) + " threads have exited";
}

// The running thread waits until it is woken; another one runs.
GPT2FAST_NO_TSAN inline void Block::wait(const char* what, const Site& site) {
    running->state = State::waiting;
    running->waits_for = what;
    running->site = site;
    if (Thread* other = next()) {
        run(other);
        return;
    }
    error = deadlock();
    running->fiber->switch_to(host);
    std::abort();  // nobody comes back to a block that was given up
}

// The running thread lets others go first, in the order of the settings.
GPT2FAST_NO_TSAN inline void Block::yield() {
    ready.push(running);
    Thread* other = next();
    if (other != running) run(other);
}

// -------------------------------------------------------------------------------------- barriers

inline void check_whole_warps(const Barrier& barrier, int id, const Site& site) {
    for (size_t w = 0; w < block().warps.size(); ++w) {
        if (barrier.lanes[w] != 0 && (barrier.lanes[w] | block().warps[w].exited) != ~0u) {
            fail("only some lanes of warp " + std::to_string(w) + " reached barrier " +
                     std::to_string(id),
                 site);
        }
    }
}

inline void complete(Barrier& barrier) {
    barrier.arrived = 0;
    barrier.lanes.fill(0);
    ++barrier.phase;
    for (Thread* each : barrier.waiting) block().wake(each);
    barrier.waiting.clear();
}

// True if the running thread is the last that the barrier expects.
inline bool arrive(Barrier& barrier, int expected, const Site& site) {
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.site = site;
    }
    barrier.lanes[size_t(thread().warp())] |= 1u << thread().lane();
    return ++barrier.arrived == expected;
}

inline void wait_or_complete(Barrier& barrier, bool last, const char* name, const Site& site) {
    if (last) {
        complete(barrier);
        block().yield();
    } else {
        barrier.waiting.push_back(&thread());
        block().wait(name, site);
    }
}

// As on hardware, threads that have exited are not waited for.
GPT2FAST_NO_TSAN inline void synchronize_block(const Site& site) {
    Barrier& barrier = block().barriers[0];
    Clock& clock = barrier.clocks[barrier.phase % 2];
    clock.release();
    {
        Bookkeeping scope;
        if (barrier.arrived > 0 && !(barrier.site == site)) {
            fail("__syncthreads, while other threads are in the one at " + to_string(barrier.site),
                 site);
        }
        const bool last = arrive(barrier, block().live, site);
        wait_or_complete(barrier, last, "__syncthreads", site);
    }
    clock.acquire();
}

GPT2FAST_NO_TSAN inline void named_barrier(int id, int threads, bool wait, const Site& site) {
    const char* name = wait ? "named_barrier_sync" : "named_barrier_arrive";
    Clock* clock;
    {
        Bookkeeping scope;
        if (id < 1 || id > 15) {
            fail(std::string(name) + ": no barrier " + std::to_string(id) +
                     " (1 to 15; 0 is __syncthreads')",
                 site);
        }
        if (threads < warp_size || threads % warp_size != 0 || threads > max_threads) {
            fail(std::string(name) + ": " + std::to_string(threads) +
                     " threads are not a number of whole warps",
                 site);
        }
        Barrier& barrier = block().barriers[size_t(id)];
        if (barrier.arrived > 0 && barrier.expected != threads) {
            fail("barrier " + std::to_string(id) + " is waited for by " + std::to_string(threads) +
                     " threads here, by " + std::to_string(barrier.expected) + " at " +
                     to_string(barrier.site),
                 site);
        }
        clock = &barrier.clocks[barrier.phase % 2];
    }
    clock->release();
    {
        Bookkeeping scope;
        Barrier& barrier = block().barriers[size_t(id)];
        const bool last = arrive(barrier, threads, site);
        if (last) check_whole_warps(barrier, id, site);
        if (wait) {
            wait_or_complete(barrier, last, name, site);
        } else if (last) {
            complete(barrier);
        }
    }
    if (wait) clock->acquire();
}

}  // namespace gpt2fast::simulator
