// Between torch's tensors and the launchers' pointers and sizes. gpt2fast/ops/cuda decides when
// these ops run and has checked what they are given.
//
// Built against torch's stable ABI; the ops live in the namespace gpt2fast_cuda. The library loads
// beside a torch without CUDA, too: what only a CUDA build of torch has is looked up weakly. With
// GPT2FAST_SIMULATED the same ops take CPU tensors, and the launchers run in the simulator.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../launch/launch.h"
#include "../common/check.h"
#include "../common/registration.h"

#ifdef GPT2FAST_SIMULATED
#define GPT2FAST_OP(op, names) GPT2FAST_REGISTER(gpt2fast_cuda, CPU, op, names)
#else
#define GPT2FAST_OP(op, names) GPT2FAST_REGISTER(gpt2fast_cuda, CUDA, op, names)
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace gpt2fast::binding {

inline DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::float32;
        case ScalarType::Half: return DType::float16;
        case ScalarType::BFloat16: return DType::bfloat16;
        case ScalarType::Char: return DType::int8;
        default: refuse("the CUDA kernels take float32, float16 and bfloat16, and caches in int8");
    }
}

// The dtypes that kernels compute with: all but int8.
inline DType float_dtype_of(const Tensor& x) {
    const DType dtype = dtype_of(x);
    GPT2FAST_CHECK(dtype != DType::int8, "the CUDA kernels take floating-point numbers, not int8");
    return dtype;
}

// While one lives, a tensor's device is the current one; `stream` is that device's current stream.
class OnDeviceOf {
public:
#ifdef GPT2FAST_SIMULATED
    explicit OnDeviceOf(const Tensor&) {}
#else
    explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
        GPT2FAST_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                       "this torch was built without CUDA");
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
        launch::use_device(x.get_device_index());
    }
#endif
    void* stream = nullptr;

private:
#ifndef GPT2FAST_SIMULATED
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline const void* data_of(const std::optional<Tensor>& x) {
    return x.has_value() ? x->const_data_ptr() : nullptr;
}

inline int64_t stride_of(const std::optional<Tensor>& x, int64_t dim) {
    return x.has_value() ? x->stride(dim) : 0;
}

}  // namespace gpt2fast::binding
