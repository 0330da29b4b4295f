// A test fails by throwing; main() runs them in order and says which one and why.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

// Which does not follow a process with threads into a fork.
#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER
#endif
#endif

namespace testing {

inline void expect(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

// |ours - exact| <= tolerance * |exact| (L2 over all elements).
inline void expect_close(const std::vector<float>& ours, const std::vector<double>& exact,
                         double tolerance, const std::string& what) {
    expect(ours.size() == exact.size(), what + ": sizes differ");
    double error = 0, norm = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        error += (ours[i] - exact[i]) * (ours[i] - exact[i]);
        norm += exact[i] * exact[i];
    }
    // Written so that NaN fails.
    expect(std::sqrt(error) <= tolerance * std::sqrt(norm),
           what + ": error " + std::to_string(std::sqrt(error / norm)) + ", allowed " +
               std::to_string(tolerance));
}

class Random {
public:
    float normal() { return std::normal_distribution<float>()(engine_); }
    int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }
    std::vector<float> normals(int64_t count, float scale = 1.0f) {
        std::vector<float> values(static_cast<size_t>(count));
        for (float& x : values) x = scale * normal();
        return values;
    }

private:
    std::mt19937 engine_{7};
};

// Runs test(); false, with a line on standard error, if it throws.
template <typename Test>
bool passes(const char* name, Test test) {
    try {
        test();
        std::printf("ok     %s\n", name);
        return true;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "FAILED %s: %s\n", name, error.what());
        return false;
    }
}

// Leaves with the exit code for a skipped test if the instruction set that the environment names
// cannot run here.
inline void need_kernels() {
    try {
        gpt2fast::kernels();
    } catch (const std::exception& error) {
        std::printf("skipped: %s\n", error.what());
        std::exit(77);
    }
}

}  // namespace testing
