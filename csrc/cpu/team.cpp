#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gpt2fast {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough for a phase's last panels, short beside a scheduler's time slice.
constexpr auto spinning = std::chrono::microseconds(20);
// The time between two steps, in which a caller samples and looks at the token.
constexpr auto yielding = std::chrono::milliseconds(2);

inline void pause_processor() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until ready(), spinning first and then giving the processor up; false once `yielding` has
// passed, if that is a limit.
template <typename Ready>
bool wait_for(Ready ready, bool limited) {
    // A look at the clock costs as much as several turns.
    for (int turn = 0; turn < 64; ++turn) {
        if (ready()) return true;
        pause_processor();
    }
    const auto start = Clock::now();
    auto waited = Clock::duration::zero();
    while (!ready()) {
        if (waited < spinning) {
            for (int turn = 0; turn < 16; ++turn) pause_processor();
        } else if (limited && waited > yielding) {
            return false;
        } else {
            sched_yield();
        }
        waited = Clock::now() - start;
    }
    return true;
}

class Team {
public:
    void run(int threads, void (*body)(void*, Worker&), void* context) {
        std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
        if (alone.owns_lock() && threads > 1) threads = grow(threads);
        if (!alone.owns_lock() || threads <= 1) {
            Meeting meeting;
            meeting.counters = std::make_unique<Meeting::Counter[]>(3);
            Worker worker(meeting, 0, 1);
            body(context, worker);
            return;
        }
        if (threads != meeting_threads_) {
            meeting_.counters = std::make_unique<Meeting::Counter[]>(3 * size_t(threads));
            meeting_threads_ = threads;
        } else {
            for (int i = 0; i < 3 * threads; ++i) {
                meeting_.counters[i].next.store(0, std::memory_order_relaxed);
            }
        }
        meeting_.arrived.store(0, std::memory_order_relaxed);
        body_ = body;
        context_ = context;
        finished_.store(0, std::memory_order_relaxed);
        const uint64_t order = (order_.load(std::memory_order_relaxed) >> 16) + 1;
        // Sequentially consistent on both sides: either we see the sleeper or it sees the order.
        order_.store(order << 16 | uint64_t(threads));
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        Worker worker(meeting_, 0, threads);
        body(context, worker);
        wait_for([&] { return finished_.load(std::memory_order_acquire) == threads - 1; }, false);
    }

private:
    // Starts workers up to `threads`, if the system gives them; returns how many threads there are.
    int grow(int threads) {
        threads = std::min(threads, max_threads);
        while (int(workers_) < threads - 1) {
            try {
                std::thread(&Team::work, this, int(workers_) + 1,
                            order_.load(std::memory_order_relaxed))
                    .detach();
            } catch (const std::system_error&) {
                return int(workers_) + 1;
            }
            ++workers_;
        }
        return threads;
    }

    void work(int index, uint64_t seen) {
        for (;;) {
            const auto ordered = [&] { return order_.load(std::memory_order_acquire) != seen; };
            if (!wait_for(ordered, true)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return order_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen = order_.load(std::memory_order_acquire);
            const int threads = int(seen & 0xffff);
            if (index >= threads) continue;
            Worker worker(meeting_, index, threads);
            body_(context_, worker);
            finished_.fetch_add(1, std::memory_order_release);
        }
    }

    std::mutex running_;
    int workers_ = 0;
    int meeting_threads_ = 0;
    Meeting meeting_;
    void (*body_)(void*, Worker&) = nullptr;
    void* context_ = nullptr;
    // A count of the runs in the upper 48 bits, the number of threads in the lower 16.
    alignas(64) std::atomic<uint64_t> order_{0};
    alignas(64) std::atomic<int> finished_{0};
    std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Never destroyed: its threads may outlive main(). A forked child has none of them and gets a new
// team; what the old one held is lost to it.
Team* team = nullptr;
std::once_flag team_made;

Team& the_team() {
    std::call_once(team_made, [] {
        team = new Team;
        pthread_atfork(nullptr, nullptr, [] { team = new Team; });
    });
    return *team;
}

// The processors that the control group's quota amounts to, or `none` without one.
int quota(int none) {
    double allowed = 0, period = 0;
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        if (std::fscanf(file, "%lf %lf", &allowed, &period) != 2) allowed = 0;
        std::fclose(file);
    } else if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
        if (std::fscanf(file, "%lf", &allowed) != 1) allowed = 0;
        std::fclose(file);
        period = 100000;
        if (std::FILE* other = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
            if (std::fscanf(other, "%lf", &period) != 1) period = 100000;
            std::fclose(other);
        }
    }
    if (allowed <= 0 || period <= 0) return none;
    return std::max(1, int(std::ceil(allowed / period)));
}

}  // namespace

void Worker::barrier() {
    if (threads_ == 1) return;
    const uint32_t round = meeting_.round.load(std::memory_order_relaxed);
    if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        meeting_.arrived.store(0, std::memory_order_relaxed);
        meeting_.round.store(round + 1, std::memory_order_release);
        return;
    }
    wait_for([&] { return meeting_.round.load(std::memory_order_acquire) != round; }, false);
}

void run_team(int threads, void (*body)(void*, Worker&), void* context) {
    the_team().run(threads, body, context);
}

int available_processors() {
    int count = int(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
    count = std::max(1, count);
    return std::min(count, quota(count));
}

}  // namespace gpt2fast
