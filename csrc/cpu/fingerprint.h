// A number that tells whether memory has changed: sums of its words and sums of those sums
// (Fletcher, 1982), so that order counts. At the speed of memory; not against an adversary.
#pragma once

#include <cstdint>
#include <cstring>

namespace gpt2fast {

inline uint64_t fingerprint(const uint8_t* data, int64_t bytes) {
    constexpr int lanes = 8;
    uint64_t sums[lanes] = {}, sums_of_sums[lanes] = {};
    int64_t i = 0;
    for (; i + 8 * lanes <= bytes; i += 8 * lanes) {
        uint64_t words[lanes];
        std::memcpy(words, data + i, sizeof words);
        for (int lane = 0; lane < lanes; ++lane) {
            sums[lane] += words[lane];
            sums_of_sums[lane] += sums[lane];
        }
    }
    uint64_t result = uint64_t(bytes);
    constexpr uint64_t odd = 0x9e3779b97f4a7c15;
    for (; i < bytes; ++i) result = (result ^ data[i]) * odd;
    for (int lane = 0; lane < lanes; ++lane) {
        result = (result ^ sums[lane]) * odd;
        result = (result ^ (result >> 29) ^ sums_of_sums[lane]) * odd;
    }
    return result;
}

}  // namespace gpt2fast
