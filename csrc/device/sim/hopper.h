// The instructions of sm_90a: mbarriers, tensor-map copies and wgmma.
//
// A copy arrives when a thread waits at its mbarrier, one at a time; until then its destination is
// NaN. A wgmma reads its operands and writes its registers when its group is waited for; until
// then they are NaN.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "ampere.h"

namespace gpt2fast::simulator {

constexpr int warpgroup_size = 128;
constexpr int box_bytes = 128;  // of a row: 64 elements

struct TensorMap {
    const unsigned char* base;
    int64_t rows, columns, row_bytes;
    int box_rows;
};

struct Load {
    unsigned char* to;
    TensorMap map;
    int64_t column, row;
    Agent agent;

    int bytes() const { return map.box_rows * box_bytes; }
};

struct Mbarrier {
    int count = 0;    // arrivals of a phase
    int pending = 0;  // of the phase under way
    int64_t bytes = 0;
    unsigned phase = 0;  // how many are over
    std::deque<Load> loads;
    std::vector<Thread*> waiting;
    Clock clock;
};

// The registers of a warpgroup that wgmmas under way will write.
struct Accumulator {
    std::array<float*, warpgroup_size> registers;
    std::array<std::vector<float>, warpgroup_size> values;
    int under_way = 0;
};

struct Matmul {
    uint64_t a, b;
    bool add;
    Accumulator* c;
    void (*multiply)(Matmul&, Clock&);
    Site site;
    Agent agent;
};

struct Warpgroup {
    const char* name = "";
    Site site{"", 0};
    int arrived = 0;
    std::array<void*, warpgroup_size> slots{};
    bool fenced = false;
    std::list<Accumulator> accumulators;
    std::deque<Matmul> products;  // of the groups, then the open ones
    std::deque<size_t> groups;
    size_t open = 0;
    Clock clock;
};

struct Hopper : Extension {
    std::map<uint32_t, Mbarrier> mbarriers;
    std::array<Warpgroup, max_threads / warpgroup_size> warpgroups;

    std::string unfinished() const override {
        for (const auto& [address, bar] : mbarriers) {
            const std::string name =
                "mbarrier at offset " + std::to_string(address - shared_window);
            if (!bar.loads.empty()) {
                return "ended before " + std::to_string(bar.loads.size()) +
                       " tma_loads were waited for, " + name;
            }
            if (bar.bytes != 0) {
                return "ended while " + name + " expected " + std::to_string(bar.bytes) +
                       " bytes more than arrived";
            }
        }
        for (const Warpgroup& group : warpgroups) {
            if (group.open > 0) return "ended with wgmmas that were never committed";
            if (!group.products.empty()) return "ended before its wgmmas were waited for";
        }
        return "";
    }
};

inline Hopper& hopper() {
    Block& b = block();
    if (b.extension == nullptr) b.extension = std::make_unique<Hopper>();
    return static_cast<Hopper&>(*b.extension);
}

// ------------------------------------------------------------------------------------- mbarriers

inline Mbarrier& mbarrier_at(uint32_t address, const Site& site) {
    resolve(address, 8, 8, "mbarrier", site);
    const auto found = hopper().mbarriers.find(address);
    if (found == hopper().mbarriers.end()) fail("mbarrier: not initialized", site);
    return found->second;
}

inline void init_mbarrier(uint32_t address, int arrivals, const Site& site) {
    kernel_write(resolve(address, 8, 8, "mbarrier_init", site), 8);
    Bookkeeping scope;
    if (arrivals < 1) fail("mbarrier_init: " + std::to_string(arrivals) + " arrivals", site);
    Mbarrier& bar = hopper().mbarriers[address];
    bar.count = bar.pending = arrivals;
}

inline void end_phase_if_complete(Mbarrier& bar) {
    if (bar.pending > 0 || bar.bytes != 0) return;
    ++bar.phase;
    bar.pending = bar.count;
    for (Thread* each : bar.waiting) block().wake(each);
    bar.waiting.clear();
}

inline void arrive_at_mbarrier(uint32_t address, int bytes, const Site& site) {
    kernel_read(resolve(address, 8, 8, "mbarrier_arrive", site), 8);
    Mbarrier* bar;
    {
        Bookkeeping scope;
        bar = &mbarrier_at(address, site);
    }
    bar->clock.release();
    Bookkeeping scope;
    if (bar->pending == 0) fail("mbarrier_arrive: more arrivals than the phase has", site);
    bar->bytes += bytes;
    --bar->pending;
    end_phase_if_complete(*bar);
}

// ------------------------------------------------------------------------------------------- TMA

inline TensorMap tensor_map(const void* base, int64_t rows, int64_t columns, int64_t row_bytes,
                            int box_rows) {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw Error(std::string("tensor_map: ") + what);
    };
    require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the matrix is not aligned to 16 bytes");
    require(row_bytes % 16 == 0, "the rows' stride is not a multiple of 16 bytes");
    require(rows > 0 && columns > 0 && row_bytes >= 2 * columns, "sizes that cannot be");
    require(box_rows > 0 && box_rows <= 256, "a box has 1 to 256 rows");
    return {static_cast<const unsigned char*>(base), rows, columns, row_bytes, box_rows};
}

// Where the box meets the matrix in one of its rows: columns from begin to end, or none.
struct Overlap {
    int64_t begin, end;
    const unsigned char* from;
};

inline Overlap overlap(const Load& load, int r) {
    const TensorMap& map = load.map;
    const int64_t row = load.row + r;
    const int64_t begin = std::max<int64_t>(load.column, 0);
    const int64_t end = std::min<int64_t>(load.column + box_bytes / 2, map.columns);
    if (row < 0 || row >= map.rows || begin >= end) return {0, 0, nullptr};
    return {begin, end, map.base + row * map.row_bytes + begin * 2};
}

inline void receive(Mbarrier& bar, Load& load) {
    std::vector<Range> reads;
    const Range write{load.to, size_t(load.bytes())};
    {
        Bookkeeping scope;
        for (int r = 0; r < load.map.box_rows; ++r) {
            const Overlap row = overlap(load, r);
            if (row.from != nullptr) reads.push_back({row.from, size_t(row.end - row.begin) * 2});
        }
    }
    load.agent.access(reads.data(), reads.size(), &write, 1, bar.clock, block().end);
    Bookkeeping scope;
    for (int r = 0; r < load.map.box_rows; ++r) {
        const Overlap row = overlap(load, r);
        uint16_t halves[box_bytes / 2] = {};
        for (int64_t column = row.begin; column < row.end; ++column) {
            std::memcpy(&halves[column - load.column], row.from + (column - row.begin) * 2, 2);
        }
        for (int chunk = 0; chunk < box_bytes / 16; ++chunk) {
            move_words(load.to + r * box_bytes + (chunk ^ r % 8) * 16, halves + chunk * 8, 16);
        }
    }
    bar.bytes -= load.bytes();
    end_phase_if_complete(bar);
}

inline void load_box(uint32_t to, const TensorMap& map, uint32_t address, int column, int row,
                     const Site& site) {
    const int bytes = map.box_rows * box_bytes;
    unsigned char* target = resolve(to, size_t(bytes), 1024, "tma_load", site);
    kernel_read(resolve(address, 8, 8, "tma_load", site), 8);
    Load load{target, map, column, row, Agent()};
    Mbarrier* bar;
    {
        Bookkeeping scope;
        bar = &mbarrier_at(address, site);
        block().statistics.async_bytes += uint64_t(bytes);
    }
    if (block().settings.async == Arrival::immediate) {
        receive(*bar, load);
        return;
    }
    const Range write{target, size_t(bytes)};
    Clock nobody;
    load.agent.access(nullptr, 0, &write, 1, nobody, block().end);
    Bookkeeping scope;
    fill_words(target, nan_word, bytes);
    bar->loads.push_back(std::move(load));
    for (Thread* each : bar->waiting) block().wake(each);  // one of them will receive it
    bar->waiting.clear();
}

inline void wait_for_mbarrier(uint32_t address, unsigned parity, const Site& site) {
    kernel_read(resolve(address, 8, 8, "mbarrier_wait", site), 8);
    Mbarrier* bar;
    {
        Bookkeeping scope;
        bar = &mbarrier_at(address, site);
        while (bar->phase % 2 == parity % 2) {
            if (bar->loads.empty()) {
                bar->waiting.push_back(&thread());
                block().wait("mbarrier_wait", site);
            } else {
                Load load = std::move(bar->loads.front());
                bar->loads.pop_front();
                receive(*bar, load);
            }
        }
    }
    bar->clock.acquire();
}

// ----------------------------------------------------------------------------------------- wgmma

// All threads of a warpgroup bring an argument; when the last has come, work() sees them all.
template <class Work>
void warpgroup_together(const char* name, void* mine, Work work, const Site& site) {
    Bookkeeping scope;
    Thread& me = thread();
    const int index = me.linear / warpgroup_size, first = index * warpgroup_size;
    if (first + warpgroup_size > block().threads) {
        fail(std::string(name) + ": this warpgroup has fewer than 128 threads", site);
    }
    Warpgroup& group = hopper().warpgroups[size_t(index)];
    if (group.arrived > 0 && (std::strcmp(group.name, name) != 0 || !(group.site == site))) {
        fail("warpgroup " + std::to_string(index) + " diverged: " + name +
                 ", while other threads are in " + group.name + " at " + to_string(group.site),
             site);
    }
    group.name = name;
    group.site = site;
    group.slots[size_t(me.linear - first)] = mine;
    if (++group.arrived < warpgroup_size) {
        block().wait(name, site);
        return;
    }
    group.arrived = 0;
    work(group);
    for (int i = first; i < first + warpgroup_size; ++i) {
        if (i != me.linear) block().wake(&block().thread[size_t(i)]);
    }
}

// Element (row, k) of an operand is half k % 8 of a 16-byte chunk: PTX ISA, "Shared Memory Matrix
// Layout", the 128-byte swizzle with K as the leading dimension.
inline uint32_t chunk_address(uint64_t descriptor, int row, int chunk, const Site& site) {
    if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is simulated", site);
    const uint32_t start = uint32_t(descriptor & 0x3FFFu) << 4;
    const uint32_t eight_rows = uint32_t(descriptor >> 32 & 0x3FFFu) << 4;
    const uint32_t address =
        start + uint32_t(row / 8) * eight_rows + uint32_t(row % 8) * 128 + uint32_t(chunk) * 16;
    return address ^ (address >> 7 & 7u) << 4;
}

// The chunks that hold an operand of so many rows and 16 columns, in their order.
inline std::vector<Range> operand(uint64_t descriptor, int rows, const Site& site) {
    std::vector<Range> chunks;
    for (int i = 0; i < 2 * rows; ++i) {
        const uint32_t address = chunk_address(descriptor, i / 2, i % 2, site);
        chunks.push_back({resolve(address, 16, 16, "wgmma", site), 16});
    }
    return chunks;
}

template <class T>
GPT2FAST_UNCHECKED void convert(const std::vector<Range>& chunks, float (*values)[16]) {
    for (size_t i = 0; i < chunks.size(); ++i) {
        uint16_t halves[8];
        move_words(halves, chunks[i].address, 16);
        for (size_t j = 0; j < 8; ++j) {
            values[i / 2][i % 2 * 8 + j] = half_to_float<T>(halves[j]);
        }
    }
}

// Register i of thread t holds this element of the 64 x N accumulator.
inline int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
inline int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

template <int N>
GPT2FAST_UNCHECKED void accumulate(const float (*a)[16], const float (*b)[16], bool add,
                                   Accumulator& c) {
    for (int t = 0; t < warpgroup_size; ++t) {
        for (int i = 0; i < N / 2; ++i) {
            float sum = add ? c.values[size_t(t)][size_t(i)] : 0.0f;
            const float* row = a[accumulator_row(t, i)];
            const float* column = b[accumulator_column(t, i)];
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            c.values[size_t(t)][size_t(i)] = sum;
        }
    }
}

template <class T, int N>
void multiply(Matmul& product, Clock& done) {
    const std::vector<Range> a_chunks = operand(product.a, 64, product.site);
    const std::vector<Range> b_chunks = operand(product.b, N, product.site);
    product.agent.access(a_chunks.data(), a_chunks.size(), nullptr, 0, done, block().end);
    product.agent.access(b_chunks.data(), b_chunks.size(), nullptr, 0, done, block().end);
    float a[64][16], b[N][16];
    convert<T>(a_chunks, a);
    convert<T>(b_chunks, b);
    accumulate<N>(a, b, product.add, *product.c);
    ++block().statistics.wgmma;
}

template <int N>
Accumulator& accumulator_of(Warpgroup& group, float* const (&registers)[warpgroup_size]) {
    for (Accumulator& each : group.accumulators) {
        if (each.registers[0] == registers[0]) return each;
    }
    Accumulator& c = group.accumulators.emplace_back();
    for (size_t t = 0; t < warpgroup_size; ++t) {
        c.registers[t] = registers[t];
        c.values[t].assign(registers[t], registers[t] + N / 2);
        fill_words(registers[t], nan_word, int(N / 2 * sizeof(float)));
    }
    return c;
}

struct MatmulArguments {
    float* c;
    uint64_t a, b;
    bool add;
};

template <class T, int N>
void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b, bool add, const Site& site) {
    MatmulArguments mine{c, a, b, add};
    warpgroup_together(
        "wgmma", &mine,
        [&](Warpgroup& group) {
            if (!group.fenced) fail("wgmma without a wgmma_fence before it", site);
            float* registers[warpgroup_size];
            for (size_t t = 0; t < warpgroup_size; ++t) {
                const auto& each = *static_cast<const MatmulArguments*>(group.slots[t]);
                if (each.a != a || each.b != b || each.add != add) {
                    fail("wgmma: the threads of a warpgroup differ in their operands", site);
                }
                registers[t] = each.c;
            }
            Accumulator& accumulator = accumulator_of<N>(group, registers);
            ++accumulator.under_way;
            group.products.push_back({a, b, add, &accumulator, multiply<T, N>, site, Agent()});
            ++group.open;
        },
        site);
}

inline void fence_wgmma(const Site& site) {
    char nothing = 0;
    warpgroup_together(
        "wgmma_fence", &nothing, [](Warpgroup& group) { group.fenced = true; }, site);
}

inline void commit_wgmma(const Site& site) {
    char nothing = 0;
    warpgroup_together(
        "wgmma_commit", &nothing,
        [](Warpgroup& group) {
            group.groups.push_back(group.open);
            group.open = 0;
        },
        site);
}

inline void finish(Warpgroup& group) {
    Matmul product = std::move(group.products.front());
    group.products.pop_front();
    product.multiply(product, group.clock);
    Accumulator& c = *product.c;
    if (--c.under_way > 0) return;
    for (size_t t = 0; t < warpgroup_size; ++t) {
        std::copy(c.values[t].begin(), c.values[t].end(), c.registers[t]);
    }
    group.accumulators.remove_if([&](const Accumulator& each) { return &each == &c; });
}

inline void wait_for_wgmma(int pending, const Site& site) {
    char nothing = 0;
    warpgroup_together(
        "wgmma_wait", &nothing,
        [&](Warpgroup& group) {
            while (group.groups.size() > size_t(pending)) {
                for (size_t i = 0; i < group.groups.front(); ++i) finish(group);
                group.groups.pop_front();
            }
        },
        site);
    hopper().warpgroups[size_t(thread().linear / warpgroup_size)].clock.acquire();
}

}  // namespace gpt2fast::simulator
