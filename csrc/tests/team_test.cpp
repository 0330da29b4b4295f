// The thread team: every item once, barriers that hold, and no thread where there should be none.
#include "cpu/team.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>

#include "testing.h"

using gpt2fast::run_team;
using gpt2fast::Worker;
using testing::expect;

namespace {

void every_item_is_done_once(int threads) {
    for (int64_t items : {0, 1, 2, 3, 7, 64, 1000}) {
        std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[size_t(items) + 1]());
        run_team(threads, [&](Worker& worker) {
            for (int phase = 0; phase < 5; ++phase) {
                worker.for_each(items, [&](int64_t i) { done[size_t(i)].fetch_add(1); });
            }
        });
        for (int64_t i = 0; i < items; ++i) {
            expect(done[size_t(i)] == 5, std::to_string(items) + " items, " +
                                             std::to_string(threads) + " threads: item " +
                                             std::to_string(i) + " was done " +
                                             std::to_string(done[size_t(i)]) + " times in 5");
        }
    }
}

// A phase reads what the phase before wrote, on whichever thread.
void a_phase_sees_the_one_before(int threads) {
    constexpr int64_t items = 37;
    std::vector<int64_t> here(items, 0), there(items, 0);
    run_team(threads, [&](Worker& worker) {
        for (int phase = 0; phase < 200; ++phase) {
            worker.for_each(items, [&](int64_t i) { there[size_t(i)] = here[size_t(i)] + 1; });
            worker.for_each(items,
                            [&](int64_t i) { here[size_t(i)] = there[size_t((i + 11) % items)]; });
        }
    });
    for (int64_t x : here) expect(x == 200, "a phase began before the last one had ended");
}

void a_barrier_holds_everybody(int threads) {
    std::atomic<int> arrived{0};
    std::atomic<bool> early{false};
    run_team(threads, [&](Worker& worker) {
        for (int round = 1; round <= 100; ++round) {
            arrived.fetch_add(1);
            worker.barrier();
            if (arrived.load() < round * worker.threads()) early = true;
            worker.barrier();
        }
    });
    expect(!early, "a thread left a barrier that another one had not reached");
}

void callers_do_not_disturb_each_other() {
    std::atomic<int64_t> total{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int run = 0; run < 50; ++run) {
                run_team(3, [&](Worker& worker) {
                    worker.for_each(100, [&](int64_t i) { total.fetch_add(i); });
                });
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    expect(total == 4 * 50 * 4950, "items were lost between callers");
}

void sizes_may_change_from_run_to_run() {
    for (int threads : {4, 1, 2, 8, 3, 8, 2}) {
        std::atomic<int> workers{0};
        run_team(threads, [&](Worker& worker) {
            if (worker.threads() == threads) workers.fetch_add(1);
            worker.for_each(10, [](int64_t) {});
        });
        expect(workers == threads, "a worker is missing");
    }
}

void a_sleeping_team_wakes() {
    for (int run = 0; run < 3; ++run) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        every_item_is_done_once(2);
    }
}

// The child has none of its parent's threads; it must neither wait for them nor for a lock that
// one of them held.
void a_forked_child_has_a_team_of_its_own() {
    every_item_is_done_once(3);
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) run_team(3, [](Worker& worker) { worker.for_each(50, [](int64_t) {}); });
    });
    for (int child = 0; child < 5; ++child) {
        const pid_t pid = fork();
        if (pid == 0) {
            alarm(20);  // a hang ends here
            bool fine = true;
            try {
                every_item_is_done_once(1);
                every_item_is_done_once(3);
            } catch (...) {
                fine = false;
            }
            _exit(fine ? 0 : 1);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child failed");
    }
    stop = true;
    busy.join();
}

void the_affinity_mask_counts() {
#if defined(__linux__)
    cpu_set_t before, one;
    sched_getaffinity(0, sizeof before, &before);
    int first = 0;
    while (!CPU_ISSET(first, &before)) ++first;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) return;
    const int available = gpt2fast::available_processors();
    sched_setaffinity(0, sizeof before, &before);
    expect(available == 1, "one processor is ours, not " + std::to_string(available));
#endif
}

}  // namespace

int main() {
    bool fine = true;
    for (int threads : {1, 2, 3, 16}) {
        const std::string suffix = ", " + std::to_string(threads) + " threads";
        const auto run = [&](const char* name, void (*test)(int)) {
            fine &= testing::passes((name + suffix).c_str(), [&] { test(threads); });
        };
        run("every item is done once", every_item_is_done_once);
        run("a phase sees the one before", a_phase_sees_the_one_before);
        run("a barrier holds everybody", a_barrier_holds_everybody);
    }
    fine &= testing::passes("callers do not disturb each other", callers_do_not_disturb_each_other);
    fine &= testing::passes("sizes may change from run to run", sizes_may_change_from_run_to_run);
    fine &= testing::passes("a sleeping team wakes", a_sleeping_team_wakes);
#ifndef THREAD_SANITIZER
    fine &= testing::passes("a forked child has a team of its own",
                            a_forked_child_has_a_team_of_its_own);
#endif
    fine &= testing::passes("the affinity mask counts", the_affinity_mask_counts);
    return fine ? 0 : 1;
}
