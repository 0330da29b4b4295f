// Runs a grid: block after block, each with shared memory of its own that starts as NaN.
#pragma once

#include <cstdlib>
#include <new>
#include <tuple>
#include <utility>

#include "block.h"
#include "launches.h"
#include "warp.h"

namespace gpt2fast::simulator {

constexpr size_t max_shared_bytes = 227 * 1024;  // sm_90; sm_80 has 163, sm_86 and sm_89 have 99
constexpr unsigned max_grid_yz = 65535;

// A block's shared memory, aligned to 1024 bytes. What lies behind its end may not be touched:
// AddressSanitizer reports it, and without it writes are found when the block ends.
class SharedMemory {
public:
    explicit SharedMemory(size_t bytes) : bytes_(bytes) {
        Bookkeeping scope;
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, padded() + guard) != 0) throw std::bad_alloc();
        data_ = static_cast<unsigned char*>(memory);
        fill_words(data_, nan_word, int(padded() + guard));
        forbid(data_ + bytes_, padded() + guard - bytes_);
    }
    ~SharedMemory() {
        Bookkeeping scope;
        allow(data_, padded() + guard);
        std::free(data_);
    }
    SharedMemory(const SharedMemory&) = delete;

    unsigned char* data() const { return data_; }

    GPT2FAST_UNCHECKED bool overrun() const {
        for (size_t i = bytes_; i < padded() + guard; ++i) {
            if (data_[i] != 0xFF) return true;
        }
        return false;
    }

private:
    static constexpr size_t guard = 1024;

    size_t padded() const { return (bytes_ + 1023) / 1024 * 1024; }

    size_t bytes_;
    unsigned char* data_ = nullptr;
};

// ThreadSanitizer takes a fiber for one thread, which remembers what it did in an earlier block.
// Two sets that take turns: between one block and the next there is no order.
#if defined(GPT2FAST_TSAN)
constexpr size_t fiber_sets = 2;
#else
constexpr size_t fiber_sets = 1;
#endif

// The running thread has returned from the kernel.
inline void exit_thread() {
    Block& b = block();
    Thread& me = thread();
    const std::string unfinished = me.copies.unfinished();
    if (!unfinished.empty() && b.error.empty()) {
        b.error =
            "block " + to_string(b.index) + " thread " + to_string(me.index) + " " + unfinished;
    }
    me.state = State::done;
    --b.live;
    try {
        exit_lane(me);
    } catch (const Error& error) {
        if (b.error.empty()) b.error = error.what();
    }
    Barrier& barrier = b.barriers[0];
    if (barrier.arrived > 0 && barrier.arrived == b.live) complete(barrier);
}

// Where every fiber begins.
GPT2FAST_NO_TSAN inline void run_thread() {
    Block& b = block();
    Fiber::entered(b.host);
    b.start.acquire();
    try {
        b.body(b.body_argument);
    } catch (const std::exception& error) {
        Bookkeeping scope;
        b.error = error.what();
    }
    b.end.release();
    Thread* other = nullptr;
    Fiber& mine = *thread().fiber;
    {
        Bookkeeping scope;
        exit_thread();
        if (b.error.empty()) {
            other = b.next();
            if (other == nullptr && b.live > 0) b.error = b.deadlock();
        }
    }
    if (other != nullptr) b.running = other;
    mine.switch_to(other != nullptr ? *other->fiber : b.host, /*ended=*/true);
}

inline void name_for_reports([[maybe_unused]] Thread& thread, [[maybe_unused]] const uint3& block) {
#if defined(GPT2FAST_TSAN)
    thread.fiber->name("thread " + to_string(thread.index) + " of block " + to_string(block));
#endif
}

inline void prepare(Block& b, const uint3& index, size_t rank) {
    b.index = index;
    b.live = b.threads;
    b.error.clear();
    b.ready.clear();
    b.extension.reset();
    // In new memory: to ThreadSanitizer the clocks in the old one would order the blocks.
    b.barriers = std::vector<Barrier>(16);
    b.warps = std::vector<Warp>(size_t(b.threads + warp_size - 1) / warp_size);
    if (b.threads % warp_size != 0) b.warps.back().exited = ~0u << b.threads % warp_size;
    for (int i = 0; i < b.threads; ++i) {
        Thread& each = b.thread[size_t(i)];
        each.fiber = b.fibers[rank % fiber_sets * size_t(b.threads) + size_t(i)].get();
        each.fiber->prepare(run_thread);
        each.index = {unsigned(i) % b.size.x, unsigned(i) / b.size.x % b.size.y,
                      unsigned(i) / (b.size.x * b.size.y)};
        each.linear = i;
        each.copies.clear();
        name_for_reports(each, index);
        b.wake(&each);
    }
}

inline std::string unfinished(const Block& b) {
    for (size_t id = 1; id < b.barriers.size(); ++id) {
        const Barrier& barrier = b.barriers[id];
        if (barrier.arrived > 0) {
            return "ended with " + std::to_string(barrier.arrived) + " of " +
                   std::to_string(barrier.expected) + " threads at barrier " + std::to_string(id) +
                   ", " + to_string(barrier.site);
        }
    }
    return b.extension ? b.extension->unfinished() : "";
}

inline void run_block(Block& b, const uint3& index, size_t rank) {
    SharedMemory shared(b.shared_bytes);
    {
        Bookkeeping scope;
        b.shared = shared.data();
        prepare(b, index, rank);
        b.running = b.next();
    }
    b.host.switch_to(*b.running->fiber);
    Bookkeeping scope;
    ++b.statistics.blocks;
    if (b.error.empty()) {
        const std::string left = unfinished(b);
        if (!left.empty()) b.error = "block " + to_string(index) + " " + left;
    }
    if (b.error.empty() && shared.overrun()) {
        b.error = "block " + to_string(index) + " wrote past the " +
                  std::to_string(b.shared_bytes) + " bytes of its shared memory";
    }
    if (!b.error.empty()) throw Error(b.error);
}

inline void check_launch(const dim3& grid, const dim3& size, size_t shared_bytes) {
    const auto refuse = [](const std::string& what) { throw Error("launch: " + what); };
    if (current_block != nullptr) refuse("a kernel cannot launch another");
    const uint64_t threads = uint64_t(size.x) * size.y * size.z;
    if (threads < 1 || threads > max_threads || size.z > 64) {
        refuse("a block of " + std::to_string(size.x) + " x " + std::to_string(size.y) + " x " +
               std::to_string(size.z) + " threads");
    }
    if (grid.x < 1 || grid.x > 0x7FFFFFFFu || grid.y < 1 || grid.y > max_grid_yz || grid.z < 1 ||
        grid.z > max_grid_yz) {
        refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
               std::to_string(grid.z) + " blocks");
    }
    if (shared_bytes > max_shared_bytes) {
        refuse(std::to_string(shared_bytes) + " bytes of shared memory, " +
               std::to_string(max_shared_bytes) + " at most");
    }
}

inline void run_grid(const dim3& grid, const dim3& size, size_t shared_bytes, void (*body)(void*),
                     void* argument) {
    static thread_local Block b;
    check_launch(grid, size, shared_bytes);
    struct Current {
        explicit Current(Block* block) { current_block = block; }
        ~Current() { current_block = nullptr; }
    } current(&b);
    std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
    {
        Bookkeeping scope;
        b.grid = grid;
        b.size = size;
        b.threads = int(size.x * size.y * size.z);
        b.shared_bytes = shared_bytes;
        b.settings = settings();
        b.body = body;
        b.body_argument = argument;
        b.random = Random(b.settings.seed);
        b.statistics = Statistics{};
        b.statistics.launches = 1;
        b.thread.resize(size_t(b.threads));
        const size_t fibers = std::min(order.size(), fiber_sets) * size_t(b.threads);
        while (b.fibers.size() < fibers) b.fibers.push_back(std::make_unique<Fiber>());
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        if (b.settings.order == Order::lifo) std::reverse(order.begin(), order.end());
        if (b.settings.order == Order::random) {
            for (size_t i = order.size(); i > 1; --i) {
                std::swap(order[i - 1], order[b.random.below(i)]);
            }
        }
    }
    b.host.adopt_os_thread();
    b.start.release();
    try {
        for (size_t rank = 0; rank < order.size(); ++rank) {
            const size_t i = order[rank];
            run_block(b,
                      {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / grid.x / grid.y)},
                      rank);
        }
    } catch (...) {
        for (const auto& fiber : b.fibers) fiber->give_up(b.host, b.end);
        b.end.acquire();
        throw;
    }
    // Only now: between one block of a launch and another there is no order.
    b.end.acquire();
    add_statistics(b.statistics);
}

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;

    template <size_t... I>
    void run(std::index_sequence<I...>) const {
        kernel(std::get<I>(arguments)...);
    }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
    Call<Parameters...> call{kernel,
                             std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
    launches().add(reinterpret_cast<const void*>(kernel), size_t(block.x) * block.y * block.z,
                   shared_bytes);
    run_grid(
        grid, block, shared_bytes,
        [](void* argument) {
            static_cast<const Call<Parameters...>*>(argument)->run(
                std::index_sequence_for<Parameters...>());
        },
        &call);
}

}  // namespace gpt2fast::simulator
