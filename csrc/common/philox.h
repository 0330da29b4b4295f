// Philox4x32-10 (Salmon et al., 2011): four random words for each key and counter of four words.
// Dropout's seed is the key, and a weight's place the counter, so that the backward pass draws
// again what the forward pass drew.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GPT2FAST_FORCE_INLINE __host__ __device__ __forceinline__
#else
#define GPT2FAST_FORCE_INLINE inline
#endif

namespace gpt2fast {

constexpr int philox_rounds = 10;

// One round on the counter c0 .. c3; the key then moves on. Inlined early, or nvcc 13 does not fold
// the zeros that counters begin with.
GPT2FAST_FORCE_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                        uint32_t low, uint32_t high) {
    const uint64_t x = uint64_t(0xd2511f53u) * c0, y = uint64_t(0xcd9e8d57u) * c2;
    c0 = uint32_t(y >> 32) ^ c1 ^ low;
    c1 = uint32_t(y);
    c2 = uint32_t(x >> 32) ^ c3 ^ high;
    c3 = uint32_t(x);
}

GPT2FAST_FORCE_INLINE void philox_next_key(uint32_t& low, uint32_t& high) {
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
}

}  // namespace gpt2fast
