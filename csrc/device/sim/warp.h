// Operations of all lanes of a warp: __syncwarp, shuffles and votes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "block.h"

namespace gpt2fast::simulator {

template <class Argument>
inline const char type_of{};

inline std::string lanes_of(uint32_t mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

inline bool complete_if_all_came(Warp& warp, size_t i, const Thread* last) {
    WarpOperation& pending = warp.pending[i];
    const uint32_t expected = pending.mask & ~warp.exited;
    if ((pending.arrived & expected) != expected) return false;
    const WarpOperation operation = pending;
    warp.pending.erase(warp.pending.begin() + std::ptrdiff_t(i));
    operation.work(operation.slots, operation.arrived);
    const int first = int(&warp - block().warps.data()) * warp_size;
    for (int lane = 0; lane < warp_size; ++lane) {
        Thread* each = &block().thread[size_t(first + lane)];
        if ((operation.arrived >> lane & 1) != 0 && each != last) block().wake(each);
    }
    return true;
}

// All lanes of the mask bring an argument; when the last has come, work() sees them all.
template <class Argument>
GPT2FAST_NO_TSAN inline void together(const char* name, uint32_t mask, bool whole_warp,
                                      Argument& mine,
                                      void (*work)(const Slots& slots, uint32_t lanes),
                                      const Site& site) {
    Bookkeeping scope;
    Thread& me = thread();
    Warp& warp = block().warps[size_t(me.warp())];
    const uint32_t bit = 1u << me.lane();
    if ((mask & bit) == 0) {
        fail(std::string(name) + ": the calling lane is not in its own mask " + lanes_of(mask),
             site);
    }
    size_t found = warp.pending.size();
    for (size_t i = 0; i < warp.pending.size(); ++i) {
        const WarpOperation& other = warp.pending[i];
        const bool same = other.mask == mask && other.type == &type_of<Argument> &&
                          std::strcmp(other.name, name) == 0 && other.site == site;
        if (same) {
            found = i;
        } else if ((other.mask & bit) != 0 && (other.arrived & mask) != 0) {
            fail("warp " + std::to_string(me.warp()) + " diverged: " + name + " of lanes " +
                     lanes_of(mask) + ", while lanes " + lanes_of(other.arrived) + " are in " +
                     other.name + " of lanes " + lanes_of(other.mask) + " at " +
                     to_string(other.site),
                 site);
        }
    }
    if (found == warp.pending.size()) {
        warp.pending.push_back({name, &type_of<Argument>, mask, 0, site, whole_warp, {}, work});
    }
    if (whole_warp && warp.exited != 0) {
        fail(std::string(name) + " needs the whole warp, lanes " + lanes_of(warp.exited) +
                 " have exited",
             site);
    }
    warp.pending[found].slots[size_t(me.lane())] = &mine;
    warp.pending[found].arrived |= bit;
    if (!complete_if_all_came(warp, found, &me)) block().wait(name, site);
}

// The running thread has exited: operations of its warp go on without it.
inline void exit_lane(Thread& me) {
    Warp& warp = block().warps[size_t(me.warp())];
    warp.exited |= 1u << me.lane();
    for (size_t i = 0; i < warp.pending.size();) {
        const WarpOperation& pending = warp.pending[i];
        if (pending.whole_warp) {
            throw Error("block " + to_string(block().index) + " thread " + to_string(me.index) +
                        " exits while its warp is in " + pending.name + " at " +
                        to_string(pending.site));
        }
        if (!complete_if_all_came(warp, i, nullptr)) ++i;
    }
}

GPT2FAST_NO_TSAN inline void synchronize_warp(uint32_t mask, const Site& site) {
    Warp& warp = block().warps[size_t(thread().warp())];
    const unsigned phase = warp.phase;
    warp.clocks[phase % 2].release();
    char nothing = 0;
    together<char>(
        "__syncwarp", mask, false, nothing,
        [](const Slots&, uint32_t) { ++block().warps[size_t(thread().warp())].phase; }, site);
    warp.clocks[phase % 2].acquire();
}

// ------------------------------------------------------------------------------------- shuffles

struct ShuffleSource {
    int lane;    // to read from
    bool valid;  // or keep one's own value
};

template <class T>
struct Shuffle {
    T value;
    T result;
    int source;
    Site site;
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, ShuffleSource source, const Site& site) {
    static_assert(sizeof(T) <= 8, "CUDA shuffles 4 and 8 bytes");
    Shuffle<T> mine{value, value, source.valid ? source.lane : thread().lane(), site};
    together<Shuffle<T>>(
        name, mask, false, mine,
        [](const Slots& slots, uint32_t lanes) {
            for (int lane = 0; lane < warp_size; ++lane) {
                if ((lanes >> lane & 1) == 0) continue;
                auto& each = *static_cast<Shuffle<T>*>(slots[size_t(lane)]);
                if ((lanes >> each.source & 1) == 0) {
                    fail("shuffle: lane " + std::to_string(lane) + " reads from lane " +
                             std::to_string(each.source) + ", which does not take part (lanes " +
                             lanes_of(lanes) + ")",
                         each.site);
                }
                each.result = static_cast<Shuffle<T>*>(slots[size_t(each.source)])->value;
            }
        },
        site);
    return mine.result;
}

inline void check_width(int width, const Site& site) {
    if (width < 1 || width > warp_size || (width & (width - 1)) != 0) {
        fail("shuffle: width " + std::to_string(width) + " is not a power of two up to 32", site);
    }
}

inline ShuffleSource source_at(int lane, int width) {
    return {(thread().lane() & ~(width - 1)) | (lane & (width - 1)), true};
}

inline ShuffleSource source_up(unsigned delta, int width) {
    const int source = thread().lane() - int(delta);
    return {source, source >= (thread().lane() & ~(width - 1))};
}

inline ShuffleSource source_down(unsigned delta, int width) {
    const int source = thread().lane() + int(delta);
    return {source, source <= (thread().lane() | (width - 1))};
}

inline ShuffleSource source_xor(int lane_mask, int width) {
    const int source = thread().lane() ^ lane_mask;
    return {source, source >= 0 && source <= (thread().lane() | (width - 1))};
}

// ---------------------------------------------------------------------------------------- votes

struct Vote {
    bool holds;
    uint32_t ballot;
};

inline uint32_t ballot(const char* name, uint32_t mask, bool holds, const Site& site) {
    Vote mine{holds, 0};
    together<Vote>(
        name, mask, false, mine,
        [](const Slots& slots, uint32_t lanes) {
            uint32_t result = 0;
            for (int lane = 0; lane < warp_size; ++lane) {
                if ((lanes >> lane & 1) == 0) continue;
                if (static_cast<Vote*>(slots[size_t(lane)])->holds) result |= 1u << lane;
            }
            for (int lane = 0; lane < warp_size; ++lane) {
                if ((lanes >> lane & 1) == 0) continue;
                static_cast<Vote*>(slots[size_t(lane)])->ballot = result;
            }
        },
        site);
    return mine.ballot;
}

}  // namespace gpt2fast::simulator
