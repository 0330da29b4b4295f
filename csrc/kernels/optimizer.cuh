// AdamW (Loshchilov & Hutter, 2019, algorithm 2) over many tensors in one launch.
//
// Bytes of an element: four numbers read, three written: 28 in float32, 14 with everything in
// bfloat16; 28 with bfloat16 parameters and gradients over float32 moments and masters. Some
// fifteen operations hide behind them: memory is the floor (GPT-2 124M in float32 at 4.8 TB/s:
// 0.73 ms). Not yet run on a GPU.
//
// The table of tensors travels as an argument of the kernel, so that nothing is copied beforehand
// and the launch can be captured; a block finds its tensor and its part of it there.
#pragma once

#include "rows.cuh"

namespace gpt2fast::kernels {

constexpr int adamw_threads = 256;
constexpr int adamw_tensors = 48;  // of a launch: its table stays below the 4 KiB of arguments
constexpr int adamw_part = 8192;   // elements that a block takes

struct AdamWTable {
    void* params[adamw_tensors];
    const void* grads[adamw_tensors];
    void* exp_avgs[adamw_tensors];
    void* exp_avg_sqs[adamw_tensors];
    float* masters[adamw_tensors];  // or null
    int64_t sizes[adamw_tensors];
    int first_blocks[adamw_tensors + 1];
    int count;
};

struct AdamWFactors {
    float decay;  // 1 - lr * weight_decay
    float beta1, beta2, one_less_beta1, one_less_beta2;
    float rate;            // lr / (1 - beta1^step)
    float inverse_spread;  // 1 / (1 - beta2^step)
    float eps;
};

// P: type of parameters and gradients; M: of the moments. With masters those are the
// parameters, and P their rounded copy.
template <typename P, typename M, int Vector>
__global__ void __launch_bounds__(adamw_threads)
    adamw(const __grid_constant__ AdamWTable table, const AdamWFactors factors) {
    int tensor = 0;
    while (int(blockIdx.x) >= table.first_blocks[tensor + 1]) ++tensor;
    const int64_t begin = int64_t(int(blockIdx.x) - table.first_blocks[tensor]) * adamw_part;
    const int64_t size = table.sizes[tensor];
    const int64_t end = begin + adamw_part < size ? begin + adamw_part : size;
    P* params = static_cast<P*>(table.params[tensor]);
    const P* grads = static_cast<const P*>(table.grads[tensor]);
    M* exp_avgs = static_cast<M*>(table.exp_avgs[tensor]);
    M* exp_avg_sqs = static_cast<M*>(table.exp_avg_sqs[tensor]);
    float* masters = table.masters[tensor];

    const auto update = [&](float& param, float grad, float& exp_avg, float& exp_avg_sq) {
        param *= factors.decay;
        exp_avg = factors.beta1 * exp_avg + factors.one_less_beta1 * grad;
        exp_avg_sq = factors.beta2 * exp_avg_sq + factors.one_less_beta2 * grad * grad;
        const float spread = sqrtf(exp_avg_sq * factors.inverse_spread) + factors.eps;
        param -= factors.rate * (exp_avg / spread);
    };
    const int64_t whole = begin + (end - begin) / Vector * Vector;
    for (int64_t i = begin + int64_t(threadIdx.x) * Vector; i < whole;
         i += adamw_threads * Vector) {
        float param[Vector], grad[Vector], exp_avg[Vector], exp_avg_sq[Vector];
        load_floats<Vector>(grads + i, grad);
        load_floats<Vector>(exp_avgs + i, exp_avg);
        load_floats<Vector>(exp_avg_sqs + i, exp_avg_sq);
        if (masters != nullptr) {
            load_floats<Vector>(masters + i, param);
        } else {
            load_floats<Vector>(params + i, param);
        }
#pragma unroll
        for (int j = 0; j < Vector; ++j) update(param[j], grad[j], exp_avg[j], exp_avg_sq[j]);
        if (masters != nullptr) store_floats<Vector>(masters + i, param);
        store_floats<Vector>(params + i, param);
        store_floats<Vector>(exp_avgs + i, exp_avg);
        store_floats<Vector>(exp_avg_sqs + i, exp_avg_sq);
    }
    for (int64_t i = whole + threadIdx.x; i < end; i += adamw_threads) {
        float param = masters != nullptr ? masters[i] : to_float(params[i]);
        float exp_avg = to_float(exp_avgs[i]), exp_avg_sq = to_float(exp_avg_sqs[i]);
        update(param, to_float(grads[i]), exp_avg, exp_avg_sq);
        if (masters != nullptr) masters[i] = param;
        params[i] = from_float<P>(param);
        exp_avgs[i] = from_float<M>(exp_avg);
        exp_avg_sqs[i] = from_float<M>(exp_avg_sq);
    }
}

}  // namespace gpt2fast::kernels
