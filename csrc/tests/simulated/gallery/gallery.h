// Bugs planted in small kernels, each beside the same kernel without it.
//
//     BUG("a store past the end") {
//         launch(kernel, ..., planted);
//         expect_equal(...);
//     }
//
// The body runs with planted = true and has to be caught: by an error of the simulator, by a
// sanitizer, or by its own comparison. With planted = false nothing may happen.
#pragma once

#include <string>
#include <vector>

#include "../testing.h"
#include "device/hopper.h"

namespace gpt2fast::simulated {

struct Bug {
    const char* name;
    void (*run)(bool planted);
};

inline std::vector<Bug>& bugs() {
    static std::vector<Bug> registered;
    return registered;
}

struct BugRegistration {
    BugRegistration(const char* name, void (*run)(bool)) { bugs().push_back({name, run}); }
};

#define GPT2FAST_BUG(name, id)                                                         \
    static void GPT2FAST_JOINED(bug_, id)(bool planted);                               \
    static const ::gpt2fast::simulated::BugRegistration GPT2FAST_JOINED(planted_, id)( \
        name, GPT2FAST_JOINED(bug_, id));                                              \
    static void GPT2FAST_JOINED(bug_, id)(bool planted)
#define GPT2FAST_BUG_ON_LINE(name, line) GPT2FAST_BUG(name, line)
#define BUG(name) GPT2FAST_BUG_ON_LINE(name, __LINE__)

// 0, 1, 2, ...
template <class T>
Buffer<T> counting(int64_t count) {
    Buffer<T> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = T(i);
    return values;
}

// Small whole numbers, whose sums of products are exact.
template <class T>
Buffer<T> whole_numbers(int64_t count) {
    Random random;
    Buffer<T> values(count);
    for (int64_t i = 0; i < count; ++i) {
        values[i] = device::from_float<T>(float(random.below(9) - 4));
    }
    return values;
}

template <class Value>
std::vector<double> exactly(int64_t count, Value value) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(double(value(i)));
    return values;
}

}  // namespace gpt2fast::simulated
