// gelu(x + bias) and its gradients.
//
// Bytes of an element in bfloat16: forward 2 read and 2 written; backward 4 read (x and the
// gradient) and 2 written, or 4 where the activation is wanted again. Some twenty operations an
// element, one exponential and one division among them: memory is the floor. (16,384 rows of 3072
// at 4.8 TB/s: 42 us forward, 63 us backward.) Not yet run on a GPU.
//
// A thread takes the same columns of many rows, so that it reads the bias once and sums the bias'
// gradient in registers; `bias_gelu_unroll` rows are in flight at once. A block leaves one row of
// partial sums, which `sum_partials` adds in a fixed order.
#pragma once

#include "gelu.cuh"
#include "rows.cuh"

namespace gpt2fast::kernels {

constexpr int bias_gelu_threads = 128;
constexpr int bias_gelu_unroll = 4;
constexpr int bias_gelu_rows = 64;  // of a block

// out is contiguous. Vector: elements that a thread takes at once, 16 bytes or a single one.
template <typename T, int Vector>
__global__ void __launch_bounds__(bias_gelu_threads)
    bias_gelu_forward(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ out,
                      int64_t rows, int columns, int64_t x_stride) {
    const int column = int(blockIdx.x * bias_gelu_threads + threadIdx.x) * Vector;
    if (column >= columns) return;
    const int64_t begin = int64_t(blockIdx.y) * bias_gelu_rows;
    const int64_t end = begin + bias_gelu_rows < rows ? begin + bias_gelu_rows : rows;
    float added[Vector];
    load_floats<Vector>(bias + column, added);
    for (int64_t row = begin; row < end; row += bias_gelu_unroll) {
        float values[bias_gelu_unroll][Vector];
#pragma unroll
        for (int i = 0; i < bias_gelu_unroll; ++i) {
            if (row + i < end) load_floats<Vector>(x + (row + i) * x_stride + column, values[i]);
        }
#pragma unroll
        for (int i = 0; i < bias_gelu_unroll; ++i) {
            if (row + i >= end) break;
#pragma unroll
            for (int j = 0; j < Vector; ++j) values[i][j] = gelu(values[i][j] + added[j]);
            store_floats<Vector>(out + (row + i) * columns + column, values[i]);
        }
    }
}

// grad_x and activated (or null) are contiguous; grad_x may be grad, where that is contiguous.
// partials: (blocks of rows, columns).
template <typename T, int Vector>
__global__ void __launch_bounds__(bias_gelu_threads)
    bias_gelu_backward(const T* grad, const T* __restrict__ x, const T* __restrict__ bias,
                       T* grad_x, T* __restrict__ activated, float* __restrict__ partials,
                       int64_t rows, int columns, int64_t grad_stride, int64_t x_stride) {
    const int column = int(blockIdx.x * bias_gelu_threads + threadIdx.x) * Vector;
    if (column >= columns) return;
    const int64_t begin = int64_t(blockIdx.y) * bias_gelu_rows;
    const int64_t end = begin + bias_gelu_rows < rows ? begin + bias_gelu_rows : rows;
    constexpr int unroll = bias_gelu_unroll / 2;  // twice the registers a row
    float added[Vector], total[Vector] = {};
    load_floats<Vector>(bias + column, added);
    for (int64_t row = begin; row < end; row += unroll) {
        float values[unroll][Vector], slopes[unroll][Vector];
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            if (row + i >= end) break;
            load_floats<Vector>(x + (row + i) * x_stride + column, values[i]);
            load_floats<Vector>(grad + (row + i) * grad_stride + column, slopes[i]);
        }
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
            if (row + i >= end) break;
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                const float z = values[i][j] + added[j];
                const float sigmoid = gelu_sigmoid(z);
                slopes[i][j] *= gelu_slope(z, sigmoid);
                values[i][j] = z * sigmoid;
                total[j] += slopes[i][j];
            }
            store_floats<Vector>(grad_x + (row + i) * columns + column, slopes[i]);
            if (activated != nullptr) {
                store_floats<Vector>(activated + (row + i) * columns + column, values[i]);
            }
        }
    }
    store_floats<Vector>(partials + int64_t(blockIdx.y) * columns + column, total);
}

// partials[y, c] = sum of x over the rows of block y.
template <typename T, int Vector>
__global__ void __launch_bounds__(bias_gelu_threads)
    sum_rows(const T* __restrict__ x, float* __restrict__ partials, int64_t rows, int columns,
             int64_t x_stride) {
    const int column = int(blockIdx.x * bias_gelu_threads + threadIdx.x) * Vector;
    if (column >= columns) return;
    const int64_t begin = int64_t(blockIdx.y) * bias_gelu_rows;
    const int64_t end = begin + bias_gelu_rows < rows ? begin + bias_gelu_rows : rows;
    float total[Vector] = {};
    for (int64_t row = begin; row < end; row += bias_gelu_unroll) {
        float values[bias_gelu_unroll][Vector];
#pragma unroll
        for (int i = 0; i < bias_gelu_unroll; ++i) {
            if (row + i < end) load_floats<Vector>(x + (row + i) * x_stride + column, values[i]);
        }
#pragma unroll
        for (int i = 0; i < bias_gelu_unroll; ++i) {
            if (row + i >= end) break;
#pragma unroll
            for (int j = 0; j < Vector; ++j) total[j] += values[i][j];
        }
    }
    store_floats<Vector>(partials + int64_t(blockIdx.y) * columns + column, total);
}

}  // namespace gpt2fast::kernels
