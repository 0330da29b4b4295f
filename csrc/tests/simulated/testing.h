// Cases for the launchers in the simulator, without torch, for the sanitizers:
//
//     CASE("layer_norm forward bf16 T=17") {
//         Random random;
//         const Buffer<bf16> x = random.normal<bf16>(17 * 64);
//         Buffer<bf16> normed(17 * 64);
//         launch::layer_norm_forward({...}, nullptr);
//         expect_close(normed, exact, 2);
//     }
//
// simulated_test runs each under several schedules. A case fails by throwing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/device_api.h"

namespace gpt2fast::simulated {

using device::bf16;
using device::fp16;

struct Case {
    const char* name;
    void (*run)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> registered;
    return registered;
}

struct Registration {
    Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

#define GPT2FAST_JOINED(a, b) a##b
#define GPT2FAST_CASE(name, id)                                                          \
    static void GPT2FAST_JOINED(case_, id)();                                            \
    static const ::gpt2fast::simulated::Registration GPT2FAST_JOINED(registration_, id)( \
        name, GPT2FAST_JOINED(case_, id));                                               \
    static void GPT2FAST_JOINED(case_, id)()
#define CASE_ON_LINE(name, line) GPT2FAST_CASE(name, line)
#define CASE(name) CASE_ON_LINE(name, __LINE__)

// ------------------------------------------------------------------------------------- buffers

// As many elements as asked for and not one more: AddressSanitizer sees both ends. Starts with all
// bits set, which is NaN (or -1): what a kernel should have written and didn't is no number.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t count) : count_(count), elements_(new T[size_t(count)]) {
        std::memset(static_cast<void*>(elements_.get()), 0xFF, size_t(count) * sizeof(T));
    }
    Buffer(int64_t count, T value) : Buffer(count) {
        for (int64_t i = 0; i < count; ++i) elements_[size_t(i)] = value;
    }

    T* data() { return elements_.get(); }
    const T* data() const { return elements_.get(); }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) { return elements_[size_t(i)]; }
    const T& operator[](int64_t i) const { return elements_[size_t(i)]; }

private:
    int64_t count_;
    std::unique_ptr<T[]> elements_;
};

template <class T>
double to_double(const T& value) {
    if constexpr (std::is_arithmetic_v<T>) {
        return double(value);
    } else {
        return double(device::to_float(value));
    }
}

// The same numbers in every run.
class Random {
public:
    explicit Random(unsigned seed = 7) : engine_(seed) {}

    float normal() { return std::normal_distribution<float>()(engine_); }
    int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }

    template <class T>
    Buffer<T> normal(int64_t count, float scale = 1.0f) {
        Buffer<T> values(count);
        for (int64_t i = 0; i < count; ++i) values[i] = device::from_float<T>(scale * normal());
        return values;
    }
    Buffer<int64_t> below(int64_t n, int64_t count) {
        Buffer<int64_t> values(count);
        for (int64_t i = 0; i < count; ++i) values[i] = below(n);
        return values;
    }

private:
    std::mt19937 engine_;
};

// ---------------------------------------------------------------------------------- comparisons

// Between 1 and the next number.
template <class T>
constexpr double epsilon = std::numeric_limits<T>::epsilon();
template <>
constexpr double epsilon<bf16> = 0x1p-7;
template <>
constexpr double epsilon<fp16> = 0x1p-10;

inline void expect(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

// A number with the digits that a float32 has.
inline std::string written(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

// |value - right| <= allowed. Written so that NaN fails.
inline void expect_near(double value, double right, double allowed, const std::string& what) {
    if (value == right || std::abs(value - right) <= allowed) return;
    const std::string bound = allowed > 0 ? ": the bound is " + written(allowed) : "";
    expect(false, what + " is " + written(value) + ", not " + written(right) + bound);
}

inline void expect_same(double value, double right, const std::string& what) {
    expect_near(value, right, 0.0, what);
}

// Memory that nobody should have written, where it was NaN before.
inline void expect_unwritten(double value, const std::string& what) {
    expect(std::isnan(value), what + " was written: " + written(value));
}

// |ours - exact| <= multiple * epsilon of the storage * |exact| (L2 over all elements).
template <class T>
void expect_close(const Buffer<T>& ours, const std::vector<double>& exact, double multiple,
                  const std::string& what) {
    expect(ours.size() == int64_t(exact.size()), what + ": sizes differ");
    double error = 0, norm = 0, furthest = -1;
    int64_t worst = 0;
    for (int64_t i = 0; i < ours.size(); ++i) {
        const double difference = to_double(ours[i]) - exact[size_t(i)];
        error += difference * difference;
        norm += exact[size_t(i)] * exact[size_t(i)];
        if (!(std::abs(difference) <= furthest)) {
            furthest = std::isnan(difference) ? INFINITY : std::abs(difference);
            worst = i;
        }
    }
    const double allowed = multiple * epsilon<T> * std::sqrt(norm);
    // Written so that NaN fails.
    if (std::sqrt(error) <= allowed) return;
    expect(false, what + ": error " + written(std::sqrt(error)) + ", the bound is " +
                      written(allowed) + " (" + written(multiple) +
                      " epsilons); the worst is element " + std::to_string(worst) + ": " +
                      written(to_double(ours[worst])) + ", not " + written(exact[size_t(worst)]));
}

template <class T>
void expect_equal(const Buffer<T>& ours, const std::vector<double>& exact,
                  const std::string& what) {
    expect(ours.size() == int64_t(exact.size()), what + ": sizes differ");
    for (int64_t i = 0; i < ours.size(); ++i) {
        expect_same(to_double(ours[i]), exact[size_t(i)], what + ": element " + std::to_string(i));
    }
}

// Run() throws, and its message contains `message`.
template <class Run>
void expect_error(const std::string& message, Run run) {
    try {
        run();
    } catch (const std::exception& error) {
        expect(std::string(error.what()).find(message) != std::string::npos,
               "another error: " + std::string(error.what()));
        return;
    }
    throw std::runtime_error("no error: " + message);
}

}  // namespace gpt2fast::simulated
