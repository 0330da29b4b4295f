// Elements whose dtype is an argument of the kernel rather than a template parameter: for tensors
// so small that a kernel compiled for each of their dtypes would not pay.
#pragma once

#include "../common/dtype.h"
#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

__device__ __forceinline__ float load_float(const void* from, DType dtype, int64_t i) {
    switch (dtype) {
        case DType::float16: return to_float(static_cast<const fp16*>(from)[i]);
        case DType::bfloat16: return to_float(static_cast<const bf16*>(from)[i]);
        default: return static_cast<const float*>(from)[i];
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
