// Softmax over keys that come tile by tile (Milakov & Gimelshein, 2018), in powers of two.
//
// A row's weights are kept relative to an exponent. It need not be the row's maximum: as long as no
// score exceeds it by more than `slack`, weights stay below 2^slack, where every format of 16 bits
// holds them as precisely as those below 1. So most tiles after the first need neither the maximum
// over a row's four lanes nor a pass over the sums (Dao et al. call this lazy rescaling in
// FlashAttention-4).
#pragma once

#include "attention.cuh"

namespace gpt2fast::kernels {

constexpr float slack = 8.0f;
// For a row that has seen nothing: below any score, and finite, so that differences are not NaN.
constexpr float no_exponent = -1.7e38f;

// The state of the rows of M accumulator tiles: row [m][half] is 16 * m + 8 * half + lane / 4.
template <int M>
struct OnlineSoftmax {
    float exponent[M][2], sum[M][2];

    __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            exponent[m][0] = exponent[m][1] = no_exponent;
            sum[m][0] = sum[m][1] = 0.0f;
        }
    }

    // Scores become weights relative to the exponents; -infinity marks what is hidden. `scale` is
    // positive and includes log2(e). `out`, the sums over values, is rescaled where need be.
    template <int N, int Columns>
    __device__ __forceinline__ void add(float (&scores)[M][N][4], float scale,
                                        float (&out)[M][Columns][4]) {
        float largest[M][2];
        bool exceeded = false;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < N; ++n) {
                    x = fmaxf(x, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                largest[m][half] = x * scale;
                exceeded |= largest[m][half] > exponent[m][half] + slack;
            }
        }
        if (__any_sync(0xffffffffu, exceeded)) raise(largest, out);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        const float weight =
                            exp2_approx(fmaf(scores[m][n][e], scale, -exponent[m][half]));
                        scores[m][n][e] = weight;
                        total += weight;
                    }
                }
                sum[m][half] += total;
            }
        }
    }

    // Adds up what the four lanes of each row have summed.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 1);
                sum[m][half] += __shfl_xor_sync(0xffffffffu, sum[m][half], 2);
            }
        }
    }

    // The factor of the sums over values; 0 for a query that saw nothing.
    __device__ __forceinline__ float inverse(int m, int half) const {
        return sum[m][half] == 0.0f ? 0.0f : 1.0f / sum[m][half];
    }

    // Natural logarithm of the sum of exponentials; infinity for a query that saw nothing.
    __device__ __forceinline__ float log_sum(int m, int half) const {
        return sum[m][half] == 0.0f ? INFINITY : exponent[m][half] * ln_2 + logf(sum[m][half]);
    }

private:
    // Raises the exponents to the rows' maxima.
    template <int Columns>
    __device__ __forceinline__ void raise(const float (&largest)[M][2],
                                          float (&out)[M][Columns][4]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = fmaxf(largest[m][half], exponent[m][half]);
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                const float factor = exp2_approx(exponent[m][half] - x);
                exponent[m][half] = x;
                sum[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < Columns; ++n) {
                    out[m][n][2 * half] *= factor;
                    out[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }
};

}  // namespace gpt2fast::kernels
