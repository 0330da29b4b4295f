// Types of tensors' elements, as all parts of csrc name them.
//
// The headers of this folder are read by the CPU kernels, the CUDA kernels, their launchers and the
// bindings alike: no torch, no CUDA, and of the standard library only <cstdint>. What is constexpr
// here runs on a GPU, too.
#pragma once

#include <cstdint>

namespace gpt2fast {

enum class DType : int32_t { float32, float16, bfloat16, int8 };

constexpr int64_t size_of(DType dtype) {
    return dtype == DType::float32 ? 4 : dtype == DType::int8 ? 1 : 2;
}

}  // namespace gpt2fast
