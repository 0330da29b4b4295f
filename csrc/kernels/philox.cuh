// Dropout from a counter: Philox4x32-10 (Salmon et al., 2011).
//
// The seed and a weight's place alone decide if it is dropped, so that the backward pass draws
// again what the forward pass drew, whatever its tiles. One call gives the 16 bits of eight
// weights: those that a thread holds of 32 consecutive keys in the accumulators of mma.m16n8k16. It
// takes 20 wide multiplications and about as many logical operations.
#pragma once

#include "../common/philox.h"
#include "../device/device_api.h"

namespace gpt2fast::kernels {

struct RandomWords {
    uint32_t v[4];
};

__device__ __forceinline__ RandomWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                              uint32_t c3) {
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < philox_rounds; ++round) {
        const uint64_t x = uint64_t(philox_multiplier_0) * c0;
        const uint64_t y = uint64_t(philox_multiplier_2) * c2;
        c0 = uint32_t(y >> 32) ^ c1 ^ low;
        c1 = uint32_t(y);
        c2 = uint32_t(x >> 32) ^ c3 ^ high;
        c3 = uint32_t(x);
        low += philox_key_step_low;
        high += philox_key_step_high;
    }
    return {{c0, c1, c2, c3}};
}

// Of attention weights. A weight is dropped if its 16 bits are less than the threshold.
struct Dropout {
    const int64_t* seed;  // on the device; read only if the threshold is not 0
    uint32_t threshold;
    float scale;  // of what is kept
};

// The bits of the weights of query t and keys 32 * (s / 32) + 8 * n + 2 * ((s % 8) / 2) + {0, 1}:
// word n, its low half for the even key.
__device__ __forceinline__ RandomWords dropout_words(uint64_t seed, int head, int t, int s) {
    return philox(seed, uint32_t(s / 32 * 4 + s % 8 / 2), uint32_t(t), uint32_t(head), 0u);
}

}  // namespace gpt2fast::kernels
