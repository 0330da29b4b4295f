// From what is known at run time to what kernels are compiled for.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "../device/device_api.h"
#include "launch.h"

namespace gpt2fast::launch {

template <typename T>
struct TypeOf {
    using type = T;
};

// Calls function(TypeOf<T>{}) with the floating-point type that `dtype` names.
template <typename Function>
void with_float(DType dtype, Function function) {
    switch (dtype) {
        case DType::float32: return function(TypeOf<float>{});
        case DType::float16: return function(TypeOf<device::fp16>{});
        case DType::bfloat16: return function(TypeOf<device::bf16>{});
        default: throw std::invalid_argument("the kernel takes float32, float16 and bfloat16");
    }
}

// True if rows of `columns` elements, `stride` apart, can be read 16 bytes at a time.
inline bool is_vector_aligned(const void* data, int64_t columns, int64_t stride, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns * bytes % 16 == 0 &&
           stride * bytes % 16 == 0;
}

// Calls function(type, vector) with 16 bytes' worth of elements, or with one where rows are not
// aligned.
template <typename Function>
void with_vector(DType dtype, bool aligned, Function function) {
    with_float(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (aligned) {
            function(type, std::integral_constant<int, 16 / int(sizeof(T))>{});
        } else {
            function(type, std::integral_constant<int, 1>{});
        }
    });
}

}  // namespace gpt2fast::launch
