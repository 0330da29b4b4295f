// Launchers of csrc/kernels/layer_norm.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

// normed, summed, mean and rstd are contiguous. summed is not written without a residual.
struct LayerNormForward {
    const void* x;
    const void* residual;  // or null
    const void* weight;
    const void* bias;
    void* normed;
    void* summed;
    float* mean;
    float* rstd;
    int64_t rows, columns, x_stride, residual_stride;
    float eps;
    DType x_dtype, residual_dtype, weight_dtype;  // residual_dtype is x_dtype without a residual
};

// grad_input is contiguous, in the dtype of summed.
struct LayerNormBackward {
    const void* grad_normed;
    const void* grad_summed;  // or null
    const void* summed;
    const float* mean;
    const float* rstd;
    const void* weight;
    void* grad_input;
    void* grad_weight;
    void* grad_bias;
    float* partials;  // layer_norm_partials(rows) * 2 * columns floats
    int64_t rows, columns, grad_normed_stride, grad_summed_stride, summed_stride;
    DType grad_dtype, summed_dtype, weight_dtype;
};

// True if kernels exist for these dtypes of x (or the gradient), the residual stream, the weights.
bool layer_norm_takes(DType x, DType residual, DType weight);

// Rows of partial sums that the backward pass leaves; a function of the shape alone.
int64_t layer_norm_partials(int64_t rows);

void layer_norm_forward(const LayerNormForward& args, void* stream);
void layer_norm_backward(const LayerNormBackward& args, void* stream);

}  // namespace gpt2fast::launch
