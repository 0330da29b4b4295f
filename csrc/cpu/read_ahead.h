// By how much a decoding step asks for weights before it needs them.
//
// Some processors read one stream from memory faster when told what comes next (an Intel Xeon of
// 2023 by a quarter), others more slowly (AMD, Zen 4, by a tenth), and weights that a cache holds
// need no telling. Results do not depend on it, so the first steps of a model try both.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace gpt2fast {

class ReadAhead {
public:
    static constexpr std::array<int64_t, 2> distances = {0, 16 << 10};  // bytes
    static constexpr int trials = 8;                                    // of each

    // The distance for the next step.
    int64_t distance() const {
        if (steps_ < trials * 2) return distances[size_t((steps_ + steps_ / 2) % 2)];  // 0 1 1 0
        return distances[size_t(fastest_[1] < fastest_[0])];
    }

    // A step with that distance took so long.
    void took(int64_t distance, double seconds) {
        if (steps_ >= trials * 2) return;
        double& fastest = fastest_[size_t(distance == distances[1])];
        fastest = std::min(fastest, seconds);
        ++steps_;
    }

private:
    int steps_ = 0;
    std::array<double, 2> fastest_ = {1e30, 1e30};
};

// What was found for steps of so many tokens, through models of so many bytes, on so many threads.
class ReadAheads {
public:
    using Kind = std::tuple<int64_t, int64_t, int>;

    int64_t distance(const Kind& kind) {
        std::lock_guard<std::mutex> lock(mutex_);
        return found_[kind].distance();
    }
    void took(const Kind& kind, int64_t distance, double seconds) {
        std::lock_guard<std::mutex> lock(mutex_);
        found_[kind].took(distance, seconds);
    }

private:
    std::mutex mutex_;
    std::map<Kind, ReadAhead> found_;
};

}  // namespace gpt2fast
