// Numbers whose storage is known when a kernel runs only: for the few of them that a kernel reads
// or writes beside the many, whose type it is compiled for.
#pragma once

#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

enum class Storage { float32, float16, bfloat16 };

__device__ __forceinline__ float load_float(const void* from, Storage storage, int64_t i) {
    switch (storage) {
        case Storage::float16: return to_float(static_cast<const fp16*>(from)[i]);
        case Storage::bfloat16: return to_float(static_cast<const bf16*>(from)[i]);
        default: return static_cast<const float*>(from)[i];
    }
}

__device__ __forceinline__ void store_float(void* to, Storage storage, int64_t i, float value) {
    switch (storage) {
        case Storage::float16: static_cast<fp16*>(to)[i] = from_float<fp16>(value); break;
        case Storage::bfloat16: static_cast<bf16*>(to)[i] = from_float<bf16>(value); break;
        default: static_cast<float*>(to)[i] = value;
    }
}

}  // namespace gpt2fast::kernels
