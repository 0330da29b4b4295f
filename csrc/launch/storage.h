// How kernels call the storage of numbers whose dtype they are not compiled for.
#pragma once

#include "../kernels/storage.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {

inline kernels::Storage storage_of(DType dtype) {
    switch (dtype) {
        case DType::float32: return kernels::Storage::float32;
        case DType::float16: return kernels::Storage::float16;
        case DType::bfloat16: return kernels::Storage::bfloat16;
        default: throw std::invalid_argument("the kernel takes float32, float16 and bfloat16");
    }
}

}  // namespace gpt2fast::launch
