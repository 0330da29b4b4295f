// CUDA's names: indices, barriers, shuffles, votes, atomics, fences and arithmetic.
//
// Atomics are relaxed, as CUDA's are: they make no order by themselves. __threadfence() does: what
// a thread wrote before its fence is seen by those that pass a fence later.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "warp.h"

// Last, since these are names that other headers may use.
#define threadIdx (::gpt2fast::simulator::thread().index)
#define blockIdx (::gpt2fast::simulator::block().index)
#define blockDim (::gpt2fast::simulator::block().size)
#define gridDim (::gpt2fast::simulator::block().grid)

// ------------------------------------------------------------------------- barriers, warps, votes

[[noreturn]] inline void __trap(GPT2FAST_SITE) {
    ::gpt2fast::simulator::fail("the kernel stopped itself by __trap", site);
}

inline void __syncthreads(GPT2FAST_SITE) { ::gpt2fast::simulator::synchronize_block(site); }
inline void __syncwarp(uint32_t mask = ~0u, GPT2FAST_SITE) {
    ::gpt2fast::simulator::synchronize_warp(mask, site);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, GPT2FAST_SITE) {
    namespace sim = ::gpt2fast::simulator;
    sim::check_width(width, site);
    return sim::shuffle("__shfl_sync", mask, value, sim::source_at(lane, width), site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, GPT2FAST_SITE) {
    namespace sim = ::gpt2fast::simulator;
    sim::check_width(width, site);
    return sim::shuffle("__shfl_up_sync", mask, value, sim::source_up(delta, width), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, GPT2FAST_SITE) {
    namespace sim = ::gpt2fast::simulator;
    sim::check_width(width, site);
    return sim::shuffle("__shfl_down_sync", mask, value, sim::source_down(delta, width), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, GPT2FAST_SITE) {
    namespace sim = ::gpt2fast::simulator;
    sim::check_width(width, site);
    return sim::shuffle("__shfl_xor_sync", mask, value, sim::source_xor(lane_mask, width), site);
}

inline uint32_t __ballot_sync(uint32_t mask, int holds, GPT2FAST_SITE) {
    return ::gpt2fast::simulator::ballot("__ballot_sync", mask, holds != 0, site);
}
inline int __any_sync(uint32_t mask, int holds, GPT2FAST_SITE) {
    return ::gpt2fast::simulator::ballot("__any_sync", mask, holds != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int holds, GPT2FAST_SITE) {
    return ::gpt2fast::simulator::ballot("__all_sync", mask, holds == 0, site) == 0;
}

// ----------------------------------------------------------------------------- atomics and fences

namespace gpt2fast::simulator {

inline Clock& fences() {
    static Clock clock;
    return clock;
}

// result = change(old), in one step.
template <class T, class Bits, class Change>
T exchange(T* address, Change change) {
    static_assert(sizeof(T) == sizeof(Bits), "as many bits");
    Bits* word = reinterpret_cast<Bits*>(address);
    Bits before = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        T old;
        std::memcpy(&old, &before, sizeof old);
        const T value = change(old);
        Bits after;
        std::memcpy(&after, &value, sizeof after);
        if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
            return old;
        }
    }
}

}  // namespace gpt2fast::simulator

inline float atomicAdd(float* address, float value) {
    return ::gpt2fast::simulator::exchange<float, uint32_t>(address,
                                                            [&](float old) { return old + value; });
}
inline double atomicAdd(double* address, double value) {
    return ::gpt2fast::simulator::exchange<double, uint64_t>(
        address, [&](double old) { return old + value; });
}
inline float atomicExch(float* address, float value) {
    return ::gpt2fast::simulator::exchange<float, uint32_t>(address, [&](float) { return value; });
}

#define GPT2FAST_INTEGER_ATOMICS(T)                                                    \
    inline T atomicAdd(T* address, T value) {                                          \
        return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);                   \
    }                                                                                  \
    inline T atomicExch(T* address, T value) {                                         \
        return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);                  \
    }                                                                                  \
    inline T atomicMax(T* address, T value) {                                          \
        return ::gpt2fast::simulator::exchange<T, T>(                                  \
            address, [&](T old) { return old > value ? old : value; });                \
    }                                                                                  \
    inline T atomicMin(T* address, T value) {                                          \
        return ::gpt2fast::simulator::exchange<T, T>(                                  \
            address, [&](T old) { return old < value ? old : value; });                \
    }                                                                                  \
    inline T atomicOr(T* address, T value) {                                           \
        return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);                    \
    }                                                                                  \
    inline T atomicAnd(T* address, T value) {                                          \
        return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);                   \
    }                                                                                  \
    inline T atomicCAS(T* address, T compare, T value) {                               \
        __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, \
                                    __ATOMIC_RELAXED);                                 \
        return compare;                                                                \
    }
GPT2FAST_INTEGER_ATOMICS(int)
GPT2FAST_INTEGER_ATOMICS(unsigned)
GPT2FAST_INTEGER_ATOMICS(unsigned long long)
#undef GPT2FAST_INTEGER_ATOMICS

inline void __threadfence() {
    ::gpt2fast::simulator::fences().acquire();
    ::gpt2fast::simulator::fences().release();
}
inline void __threadfence_block() { __threadfence(); }

// ------------------------------------------------------------------------- loads, bits, arithmetic

// clang-format off
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> void __stcs(T* address, T value) { *address = value; }
template <class T> void __stcg(T* address, T value) { *address = value; }
// clang-format on

template <class To, class From>
To gpt2fast_reinterpret(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "as many bits");
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return gpt2fast_reinterpret<int>(x); }
inline unsigned __float_as_uint(float x) { return gpt2fast_reinterpret<unsigned>(x); }
inline float __int_as_float(int x) { return gpt2fast_reinterpret<float>(x); }
inline float __uint_as_float(unsigned x) { return gpt2fast_reinterpret<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= unsigned(bytes >> (selector >> 4 * i & 7u) * 8 & 0xFFu) << 8 * i;
    }
    return result;
}

#define GPT2FAST_MIN_MAX(T)                          \
    inline T min(T a, T b) { return b < a ? b : a; } \
    inline T max(T a, T b) { return a < b ? b : a; }
GPT2FAST_MIN_MAX(int)
GPT2FAST_MIN_MAX(unsigned)
GPT2FAST_MIN_MAX(long)
GPT2FAST_MIN_MAX(unsigned long)
GPT2FAST_MIN_MAX(long long)
GPT2FAST_MIN_MAX(unsigned long long)
#undef GPT2FAST_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
