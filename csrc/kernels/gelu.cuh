// gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))) (Hendrycks & Gimpel, 2016, tanh
// form) and its derivative, in float32.
//
// tanh(u) = 1 - 2 / (1 + e^(2u)), so z / 2 * (1 + tanh(u)) = z * sigmoid(2u): one exponential and
// one division (approximate, by 2 units in the last place); tanh.approx would be off by 2^-11.
#pragma once

#include "../common/gelu.h"
#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

__device__ __forceinline__ float gelu_sigmoid(float z) {
    constexpr float log2_e = 1.4426950408889634f;
    const float twice = 2.0f * gelu_scale * (z + gelu_cubic * z * z * z);
    return __fdividef(1.0f, 1.0f + exp2_approx(-twice * log2_e));
}

__device__ __forceinline__ float gelu(float z) { return z * gelu_sigmoid(z); }

// d/dz (z * s(2u(z))) = s + z * s * (1 - s) * 2 u'
__device__ __forceinline__ float gelu_slope(float z, float sigmoid) {
    const float twice_slope = 2.0f * gelu_scale * (1.0f + 3.0f * gelu_cubic * z * z);
    return sigmoid + z * sigmoid * (1.0f - sigmoid) * twice_slope;
}

}  // namespace gpt2fast::kernels
