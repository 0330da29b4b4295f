// Reading, writing and summing rows, for the kernels that are bound by memory.
#pragma once

#include "../device/device_api.h"

namespace gpt2fast::kernels {

using namespace device;

constexpr unsigned all_lanes = 0xffffffffu;

// N consecutive elements, 16 bytes at a time where there are as many; aligned as such.
template <int N, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[N]) {
    constexpr int width = N * int(sizeof(T)) < 16 ? N : 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < N; i += width) {
        const Vector<T, width> part = load_vector<width>(from + i);
#pragma unroll
        for (int j = 0; j < width; ++j) to[i + j] = to_float(part.v[j]);
    }
}

template <int N, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[N]) {
    constexpr int width = N * int(sizeof(T)) < 16 ? N : 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < N; i += width) {
        Vector<T, width> part;
#pragma unroll
        for (int j = 0; j < width; ++j) part.v[j] = from_float<T>(from[i + j]);
        store_vector(to + i, part);
    }
}

// The value rounded to T, as other kernels read it later.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
    return to_float(from_float<T>(value));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(all_lanes, value, distance);
    }
    return value;
}

// The sum over a block of `Threads`; `shared` holds Threads / 32 floats that nobody else uses
// until the next barrier.
template <int Threads>
__device__ __forceinline__ float block_sum(float value, float* shared) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Threads / 32; ++warp) value += shared[warp];
    return value;
}

constexpr int sum_rows_columns = 32;
constexpr int sum_rows_strips = 8;

// out[c] = sum over rows of in[r, c], rows lying `stride` apart; from column `split` on, the sums
// go to `rest`. A block takes 32 columns, each of its strips every eighth row, always in the same
// order.
template <typename Out>
__global__ void __launch_bounds__(sum_rows_columns* sum_rows_strips)
    sum_partials(const float* __restrict__ in, Out* __restrict__ out, Out* __restrict__ rest,
                 int64_t split, int64_t rows, int64_t columns, int64_t stride) {
    GPT2FAST_SHARED(memory);
    float* shared = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x % sum_rows_columns, strip = threadIdx.x / sum_rows_columns;
    const int64_t column = int64_t(blockIdx.x) * sum_rows_columns + lane;
    float total = 0.0f;
    if (column < columns) {
        for (int64_t row = strip; row < rows; row += sum_rows_strips) {
            total += in[row * stride + column];
        }
    }
    shared[threadIdx.x] = total;
    __syncthreads();
    if (strip != 0 || column >= columns) return;
    for (int other = 1; other < sum_rows_strips; ++other) {
        total += shared[other * sum_rows_columns + lane];
    }
    if (column < split) {
        out[column] = from_float<Out>(total);
    } else {
        rest[column - split] = from_float<Out>(total);
    }
}

}  // namespace gpt2fast::kernels
