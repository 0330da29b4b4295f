// Stand-in for CUDA's run-time library, as much of it as the host's half of device_api.h calls: two
// devices that count what is asked of them. It runs no kernel.
#pragma once

#include <atomic>
#include <cstddef>

#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace fake_cuda {

constexpr int multiprocessors[2] = {132, 108};
constexpr int most_shared[2] = {227 << 10, 163 << 10};
inline thread_local int device = 0;
// Of one kernel on each device, as the driver keeps it.
inline std::atomic<int> allowed[2] = {48 << 10, 48 << 10};
inline std::atomic<int> settings{0}, questions{0}, launches{0}, refused{0};

}  // namespace fake_cuda

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = fake_cuda::device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    fake_cuda::device = device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    ++fake_cuda::questions;
    *value = which == cudaDevAttrMultiProcessorCount ? fake_cuda::multiprocessors[device]
                                                     : fake_cuda::most_shared[device];
    return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    ++fake_cuda::settings;
    fake_cuda::allowed[fake_cuda::device] = value;
    return value > fake_cuda::most_shared[fake_cuda::device] ? cudaErrorInvalidValue : cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(Parameters...),
                               Arguments...) {
    ++fake_cuda::launches;
    if (int(config->dynamicSmemBytes) <= fake_cuda::allowed[fake_cuda::device]) return cudaSuccess;
    ++fake_cuda::refused;
    return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
