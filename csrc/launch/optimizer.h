// Launcher of csrc/kernels/optimizer.cuh.
#pragma once

#include <vector>

#include "launch.h"

namespace gpt2fast::launch {

struct AdamWTensor {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    float* master;  // or null: param is the parameter itself
    int64_t size;
};

// All tensors contiguous, of the same dtypes: param and grad of one, both moments of one.
struct AdamW {
    std::vector<AdamWTensor> tensors;
    int64_t step;
    double lr, beta1, beta2, eps, weight_decay;
    DType dtype, moment_dtype;  // moment_dtype is dtype or float32
};

void adamw(const AdamW& args, void* stream);

}  // namespace gpt2fast::launch
