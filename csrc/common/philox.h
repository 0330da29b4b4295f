// The constants of Philox4x32-10 (Salmon et al., 2011): four random words for each key and counter
// of four words. Dropout's seed is the key, and a weight's place the counter, so that the backward
// pass draws again what the forward pass drew.
//
// Not the rounds themselves: a CPU makes them for many counters at once, and a function that both
// call took nvcc 13 eight percent more logical operations in the attention kernels.
#pragma once

#include <cstdint>

namespace gpt2fast {

constexpr int philox_rounds = 10;
constexpr uint32_t philox_multiplier_0 = 0xd2511f53u, philox_multiplier_2 = 0xcd9e8d57u;
constexpr uint32_t philox_key_step_low = 0x9e3779b9u, philox_key_step_high = 0xbb67ae85u;

}  // namespace gpt2fast
