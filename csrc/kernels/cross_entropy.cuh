// Cross-entropy of rows of logits, which become their own gradient (of a mean over rows).
//
// A block a row. First pass: maximum and sum of exponentials together, each thread for its part
// ("online", Milakov & Gimelshein, 2018); second pass: softmax - onehot, in place. Bytes of an
// element in bfloat16: 2 read and 2 written, if the second read comes from the second-level cache:
// blocks of 1024 threads leave few enough rows in flight (one a multiprocessor, for more than 32
// registers a thread: 13 MB of logits of GPT-2's vocabulary on a chip of 132) that it
// does. Three vectors of a thread are under way. One exponential a pass. Memory is the floor.
// Not yet run on a GPU.
#pragma once

#include "elements.cuh"
#include "rows.cuh"

namespace gpt2fast::kernels {

constexpr int cross_entropy_threads = 1024;

// Vectors that a thread has under way.
template <int Vector>
constexpr int cross_entropy_unroll = Vector == 1 ? 4 : 3;

// A sum of exponentials, each divided by that of the maximum.
struct ScaledSum {
    float maximum = -INFINITY, sum = 0.0f;
};

// e^x; differences from a maximum are taken before they are scaled, which loses nothing.
__device__ __forceinline__ float exponential(float x) {
    constexpr float log2_e = 1.4426950408889634f;
    return exp2_approx(x * log2_e);
}

__device__ __forceinline__ ScaledSum operator+(ScaledSum a, ScaledSum b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    if (maximum == -INFINITY) return {maximum, a.sum + b.sum};  // nothing, or NaN
    return {maximum,
            a.sum * exponential(a.maximum - maximum) + b.sum * exponential(b.maximum - maximum)};
}

// factor: what the loss' gradient is multiplied with, on the device: one over the rows that count.
// Differentiate: whether logits become gradients.
template <typename T, int Vector, bool Differentiate>
__global__ void __launch_bounds__(cross_entropy_threads)
    cross_entropy(T* logits, const int64_t* __restrict__ targets, const float* __restrict__ factor,
                  float* __restrict__ losses, int columns, int64_t stride, int64_t ignore_index) {
    constexpr int warps = cross_entropy_threads / 32;
    GPT2FAST_SHARED(memory);
    ScaledSum* shared = reinterpret_cast<ScaledSum*>(memory);
    const int64_t row = blockIdx.x;
    const int64_t target = targets[row];
    T* values = logits + row * stride;
    const int tail = columns / Vector * Vector;  // from here on one element at a time

    if (target == ignore_index) {
        if (threadIdx.x == 0) losses[row] = 0.0f;
        if constexpr (Differentiate) {
            for (int i = threadIdx.x; i < columns; i += cross_entropy_threads) {
                values[i] = from_float<T>(0.0f);
            }
        }
        return;
    }
    // Outside of the vocabulary there is no loss; as in torch, that ends the kernel.
    if (target < 0 || target >= columns) __trap();

    // Calls function(part, i) with the vectors before the tail, each at its place i.
    const auto for_vectors = [&](auto function) {
        constexpr int unroll = cross_entropy_unroll<Vector>;
        constexpr int stride = cross_entropy_threads * Vector;
        for (int first = int(threadIdx.x) * Vector; first < tail; first += unroll * stride) {
            Elements<T, Vector> parts[unroll];
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                if (first + u * stride < tail) parts[u].load(values + first + u * stride);
            }
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                if (first + u * stride >= tail) continue;
                float part[Vector];
#pragma unroll
                for (int j = 0; j < Vector; ++j) part[j] = parts[u][j];
                function(part, first + u * stride);
            }
        }
    };

    ScaledSum total;
    const auto add = [&](float score) {
        if (score > total.maximum) {
            total.sum = total.sum * exponential(total.maximum - score) + 1.0f;
            total.maximum = score;
        } else if (score > -INFINITY || score != score) {
            total.sum += exponential(score - total.maximum);
        }
    };
    for_vectors([&](const float (&part)[Vector], int) {
        float high = part[0];
#pragma unroll
        for (int j = 1; j < Vector; ++j) high = fmaxf(high, part[j]);
        if (high > total.maximum) {
            total.sum *= exponential(total.maximum - high);
            total.maximum = high;
        }
        if (total.maximum > -INFINITY) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) total.sum += exponential(part[j] - total.maximum);
        } else {
#pragma unroll
            for (int j = 0; j < Vector; ++j) add(part[j]);  // -inf, NaN
        }
    });
    for (int i = tail + int(threadIdx.x); i < columns; i += cross_entropy_threads) {
        add(to_float(values[i]));
    }
    const float picked = to_float(values[target]);

    const auto exchanged = [&](ScaledSum mine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            const ScaledSum other{__shfl_xor_sync(all_lanes, mine.maximum, distance),
                                  __shfl_xor_sync(all_lanes, mine.sum, distance)};
            mine = mine + other;
        }
        return mine;
    };
    total = exchanged(total);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = total;
    __syncthreads();
    total = threadIdx.x % 32 < warps ? shared[threadIdx.x % 32] : ScaledSum{};
    total = exchanged(total);
    const float lse = total.maximum + logf(total.sum);
    if (threadIdx.x == 0) losses[row] = lse - picked;

    if constexpr (Differentiate) {
        const float scale = *factor;
        const auto gradient = [&](float score, int i) {
            const float weight = exponential(score - lse);
            return (i == target ? weight - 1.0f : weight) * scale;
        };
        for_vectors([&](float (&part)[Vector], int i) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) part[j] = gradient(part[j], i + j);
            store_floats<Vector>(values + i, part);
        });
        for (int i = tail + int(threadIdx.x); i < columns; i += cross_entropy_threads) {
            values[i] = from_float<T>(gradient(to_float(values[i]), i));
        }
    }
}

}  // namespace gpt2fast::kernels
