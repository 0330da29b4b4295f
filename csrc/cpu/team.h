// A team of threads that works through a chain of short phases.
//
// Workers spin for a moment, then yield, then sleep: a phase of a decoding step lasts some
// microseconds, less than it takes to wake a thread, but a core that another process wants must
// be given up.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace gpt2fast {

constexpr int max_threads = 256;

// State that the threads of one run share.
struct Meeting {
    struct alignas(64) Counter {
        std::atomic<int64_t> next{0};
    };
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
    // Three sets of counters, one claimed from, one clean, one being cleaned.
    std::unique_ptr<Counter[]> counters;
};

// One thread's part in a run.
class Worker {
public:
    Worker(Meeting& meeting, int index, int threads)
        : meeting_(meeting), index_(index), threads_(threads) {}

    int index() const { return index_; }
    int threads() const { return threads_; }

    // Calls work(item) for every item of [0, items) once, on one thread or another, and returns
    // when all are done. A thread begins with its own share, always the same one; when it has
    // finished it takes over from the others.
    template <typename Work>
    void for_each(int64_t items, Work work) {
        Meeting::Counter* counters = meeting_.counters.get() + set_ * threads_;
        for (int turn = 0; turn < threads_; ++turn) {
            const int owner = (index_ + turn) % threads_;
            const int64_t begin = items * owner / threads_;
            const int64_t size = items * (owner + 1) / threads_ - begin;
            std::atomic<int64_t>& next = counters[owner].next;
            if (turn > 0 && next.load(std::memory_order_relaxed) >= size) continue;
            for (;;) {
                const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
                if (item >= size) break;
                work(begin + item);
            }
        }
        // Everybody left the set after this one at the last barrier and enters it at the next.
        set_ = (set_ + 1) % 3;
        const int cleaned = (set_ + 1) % 3;
        meeting_.counters[cleaned * threads_ + index_].next.store(0, std::memory_order_relaxed);
        barrier();
    }

    // Returns when every thread of the run has called it.
    void barrier();

private:
    Meeting& meeting_;
    int index_;
    int threads_;
    int set_ = 0;
};

// Runs body(context, worker) on `threads` threads, the caller's among them. Where the team is at
// work for another caller, or was forked from under us, the caller's thread runs alone.
void run_team(int threads, void (*body)(void* context, Worker& worker), void* context);

template <typename Body>
void run_team(int threads, Body body) {
    run_team(
        threads, [](void* context, Worker& worker) { (*static_cast<Body*>(context))(worker); },
        &body);
}

// Processors that this process may use: its affinity mask, its control group's quota rounded up.
int available_processors();

}  // namespace gpt2fast
