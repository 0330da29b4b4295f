// Elements as they were loaded; and those whose dtype is an argument of the kernel rather than a
// template parameter, for tensors so small that a kernel compiled for each dtype would not pay.
#pragma once

#include "../common/dtype.h"
#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

// Consecutive elements as they were loaded. Those smaller than a word stay in words until they are
// used: the compiler takes them apart at once, into more registers than there are, and waits for
// each load before it starts the next.
template <typename T, int Width, bool InWords = sizeof(T) < 4 && sizeof(T) * Width % 4 == 0>
struct Elements {
    Vector<T, Width> loaded;

    __device__ __forceinline__ void load(const T* from) { loaded = load_vector<Width>(from); }
    __device__ __forceinline__ float operator[](int i) const { return to_float(loaded.v[i]); }
};

// An element of a word.
template <typename T>
__device__ __forceinline__ float element_of(uint32_t word, int i);
template <>
__device__ __forceinline__ float element_of<bf16>(uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ float element_of<fp16>(uint32_t word, int i) {
    const uint16_t bits = uint16_t(i == 0 ? word : word >> 16);
    fp16 element;
    memcpy(&element, &bits, sizeof bits);
    return to_float(element);
}
// The number 2^23 + 128 + x ends in the byte of x, its sign bit flipped: a permutation and a
// subtraction, where conversions are among the slow instructions.
template <>
__device__ __forceinline__ float element_of<int8_t>(uint32_t word, int i) {
    const uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x4B000000u, 0x7650u | unsigned(i));
    return __uint_as_float(bits) - (8388608.0f + 128.0f);
}

template <typename T, int Width>
struct Elements<T, Width, true> {
    static constexpr int of_word = 4 / int(sizeof(T));
    Vector<uint32_t, Width / of_word> loaded;

    __device__ __forceinline__ void load(const T* from) {
        loaded = load_words<Width / of_word>(from);
    }
    __device__ __forceinline__ float operator[](int i) const {
        return element_of<T>(loaded.v[i / of_word], i % of_word);
    }
};

// The same, in accesses of 16 bytes where there are as many.
template <typename T, int Count>
struct Row {
    static constexpr int width = Count * int(sizeof(T)) < 16 ? Count : 16 / int(sizeof(T));
    Elements<T, width> parts[Count / width];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < Count / width; ++i) parts[i].load(from + i * width);
    }
    __device__ __forceinline__ float operator[](int i) const { return parts[i / width][i % width]; }
};

// Calls function(pointer) with the elements' own type.
template <typename Function>
__device__ __forceinline__ void with_dtype(const void* from, DType dtype, Function function) {
    switch (dtype) {
        case DType::float16: return function(static_cast<const fp16*>(from));
        case DType::bfloat16: return function(static_cast<const bf16*>(from));
        default: return function(static_cast<const float*>(from));
    }
}

__device__ __forceinline__ void store_float(void* to, DType dtype, int64_t i, float value) {
    switch (dtype) {
        case DType::float16: static_cast<fp16*>(to)[i] = from_float<fp16>(value); break;
        case DType::bfloat16: static_cast<bf16*>(to)[i] = from_float<bf16>(value); break;
        default: static_cast<float*>(to)[i] = value;
    }
}

}  // namespace gpt2fast::kernels
