// Launchers of csrc/kernels/mlp.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

// out is contiguous.
struct BiasGelu {
    const void* x;
    const void* bias;
    void* out;
    int64_t rows, columns, x_stride;
    DType dtype;
};

// grad_x and activated are contiguous; grad_x may be grad.
struct BiasGeluBackward {
    const void* grad;
    const void* x;
    const void* bias;
    void* grad_x;
    void* activated;  // or null
    void* grad_bias;
    float* partials;  // row_partials(rows) * columns floats
    int64_t rows, columns, grad_stride, x_stride;
    DType dtype;
};

struct SumRows {
    const void* x;
    void* out;
    float* partials;  // row_partials(rows) * columns floats
    int64_t rows, columns, x_stride;
    DType dtype;
};

int64_t row_partials(int64_t rows);

void bias_gelu(const BiasGelu& args, void* stream);
void bias_gelu_backward(const BiasGeluBackward& args, void* stream);
void sum_rows(const SumRows& args, void* stream);

}  // namespace gpt2fast::launch
