// Sizes and strides of tensors.
#pragma once

#include <cstdint>

namespace gpt2fast {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A (batch, time, heads, head size) tensor, or (rows, entries, heads, head size) of a cache: the
// last dimension is contiguous, strides count elements.
template <typename T>
struct Heads {
    T* data;
    int64_t row_stride, entry_stride, head_stride;

    constexpr T* at(int64_t row, int64_t entry, int64_t head) const {
        return data + row * row_stride + entry * entry_stride + head * head_stride;
    }

    // The same memory as elements of another type.
    template <typename U>
    constexpr Heads<U> as() const {
        return {static_cast<U*>(data), row_stride, entry_stride, head_stride};
    }
};

// A vector of integers.
struct Integers {
    const int64_t* data;
    int64_t stride;

    constexpr int64_t operator[](int64_t i) const { return data[i * stride]; }
};

}  // namespace gpt2fast
