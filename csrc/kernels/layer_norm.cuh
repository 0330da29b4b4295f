// Residual add and layer normalization (Ba et al., 2016), forward and backward.
//
// Bytes of an element in bfloat16: forward 4 read (x, residual) and 4 written (normed, summed);
// backward 6 read (two gradients, the sum) and 2 written. Some ten operations an element: memory
// is the floor, 8 bytes an element either way (16,384 rows of 768 at 4.8 TB/s: 21 us).
// Not yet run on a GPU.
//
// Forward: a warp a row, which it keeps in registers from the one read to the one write.
// Backward: a group of threads a row, one vector a thread, so that the sums for the gradients of
// weight and bias need 2 * vector registers a thread; a block adds up its groups' sums and leaves
// one row of partial sums, which `sum_partials` adds in a fixed order. No atomics.
// Widths that these don't take (odd, unaligned, beyond 2048): kernels of a block a row.
#pragma once

#include "elements.cuh"
#include "rows.cuh"

namespace gpt2fast::kernels {

// X, R, W: types of x and the result, of the residual and the sum, of weight and bias.
template <typename X, typename R, typename W>
struct LayerNormRows {
    const X* x;
    const R* residual;  // null: summed is not written, x is normalized
    const W* weight;
    const W* bias;
    X* normed;
    R* summed;
    float* mean;
    float* rstd;
    int64_t rows;
    int columns;
    int64_t x_stride, residual_stride;
    float eps;
};

constexpr int layer_norm_rows_per_block = 4;

// Rows of at most 32 * Vectors * Vector columns, a multiple of Vector, aligned to 16 bytes.
template <typename X, typename R, typename W, int Vector, int Vectors>
__global__ void __launch_bounds__(32 * layer_norm_rows_per_block)
    layer_norm_forward(const LayerNormRows<X, R, W> args) {
    const int64_t row = int64_t(blockIdx.x) * layer_norm_rows_per_block + threadIdx.x / 32;
    if (row >= args.rows) return;
    const int lane = threadIdx.x % 32;
    const int columns = args.columns;
    float values[Vectors][Vector];
    float total = 0.0f;
    // Loads before stores: the compiler doesn't know that they differ. Of float32 registers suffice
    // for a few vectors of the residual beside x.
    constexpr int batch = sizeof(X) == 4 ? 4 : Vectors;
    Row<X, Vector> x[Vectors];
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
        const int column = (i * 32 + lane) * Vector;
        if (column < columns) x[i].load(args.x + row * args.x_stride + column);
    }
    if (args.residual != nullptr) {
#pragma unroll
        for (int first = 0; first < Vectors; first += batch) {
            Row<R, Vector> residual[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const int column = ((first + i) * 32 + lane) * Vector;
                if (column < columns) {
                    residual[i].load(args.residual + row * args.residual_stride + column);
                }
            }
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const int column = ((first + i) * 32 + lane) * Vector;
                if (column < columns) {
                    float (&sums)[Vector] = values[first + i];
#pragma unroll
                    for (int j = 0; j < Vector; ++j) {
                        sums[j] = rounded<R>(residual[i][j] + x[first + i][j]);
                    }
                    store_floats<Vector>(args.summed + row * columns + column, sums);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < Vectors; ++i) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) values[i][j] = x[i][j];
        }
    }
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
        if ((i * 32 + lane) * Vector < columns) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) total += values[i][j];
        }
    }
    const float mean = warp_sum(total) / float(columns);
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
        if ((i * 32 + lane) * Vector < columns) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                const float deviation = values[i][j] - mean;
                square += deviation * deviation;
            }
        }
    }
    const float rstd = rsqrtf(warp_sum(square) / float(columns) + args.eps);
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
        const int column = (i * 32 + lane) * Vector;
        if (column < columns) {
            float weight[Vector], bias[Vector];
            load_floats<Vector>(args.weight + column, weight);
            load_floats<Vector>(args.bias + column, bias);
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                values[i][j] = (values[i][j] - mean) * rstd * weight[j] + bias[j];
            }
            store_floats<Vector>(args.normed + row * columns + column, values[i]);
        }
    }
    if (lane == 0) {
        args.mean[row] = mean;
        args.rstd[row] = rstd;
    }
}

constexpr int layer_norm_any_threads = 256;

// Rows of any width and alignment: read again from the cache for each pass.
template <typename X, typename R, typename W>
__global__ void __launch_bounds__(layer_norm_any_threads)
    layer_norm_forward_any(const LayerNormRows<X, R, W> args) {
    GPT2FAST_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);
    constexpr int warps = layer_norm_any_threads / 32;
    const int64_t row = blockIdx.x;
    const int columns = args.columns;
    const X* x = args.x + row * args.x_stride;
    const R* residual =
        args.residual == nullptr ? nullptr : args.residual + row * args.residual_stride;
    const auto value = [&](int column) {
        const float branch = to_float(x[column]);
        return residual == nullptr ? branch : rounded<R>(to_float(residual[column]) + branch);
    };
    float total = 0.0f;
    for (int column = threadIdx.x; column < columns; column += layer_norm_any_threads) {
        const float sum = value(column);
        if (residual != nullptr) args.summed[row * columns + column] = from_float<R>(sum);
        total += sum;
    }
    const float mean = block_sum<layer_norm_any_threads>(total, sums) / float(columns);
    float square = 0.0f;
    for (int column = threadIdx.x; column < columns; column += layer_norm_any_threads) {
        const float deviation = value(column) - mean;
        square += deviation * deviation;
    }
    const float variance = block_sum<layer_norm_any_threads>(square, sums + warps) / float(columns);
    const float rstd = rsqrtf(variance + args.eps);
    for (int column = threadIdx.x; column < columns; column += layer_norm_any_threads) {
        args.normed[row * columns + column] =
            from_float<X>((value(column) - mean) * rstd * to_float(args.weight[column]) +
                          to_float(args.bias[column]));
    }
    if (threadIdx.x == 0) {
        args.mean[row] = mean;
        args.rstd[row] = rstd;
    }
}

// G: type of the gradient of `normed`; R: of the sum and its gradients.
template <typename G, typename R, typename W>
struct LayerNormGradients {
    const G* grad_normed;
    const R* grad_summed;  // or null
    const R* summed;
    const float* mean;
    const float* rstd;
    const W* weight;
    R* grad_input;
    float* partials;  // (blocks, 2, columns): sums for the gradients of weight and of bias
    int64_t rows;
    int columns;
    int64_t grad_normed_stride, grad_summed_stride, summed_stride;
};

constexpr int layer_norm_backward_threads = 512;

// Rows of at most Threads * Vector columns, a multiple of Vector, aligned to 16 bytes; Threads
// threads work on a row. Shared: 4 floats for each warp, and 2 * columns floats.
template <typename G, typename R, typename W, int Vector, int Threads>
__global__ void __launch_bounds__(layer_norm_backward_threads)
    layer_norm_backward(const LayerNormGradients<G, R, W> args) {
    constexpr int groups = layer_norm_backward_threads / Threads;
    constexpr int warps = Threads / 32;
    GPT2FAST_SHARED(memory);
    const int group = threadIdx.x / Threads, thread = threadIdx.x % Threads;
    // Two sums a warp, twice: what one row's threads still read, the next row's don't overwrite.
    float* exchange = reinterpret_cast<float*>(memory) + group * warps * 4;
    float* collected = reinterpret_cast<float*>(memory) + groups * warps * 4;
    const int columns = args.columns;
    const int column = thread * Vector;
    const bool active = column < columns;
    float weight[Vector] = {}, grad_weight[Vector] = {}, grad_bias[Vector] = {};
    if (active) load_floats<Vector>(args.weight + column, weight);

    int turn = 0;
    for (int64_t row = int64_t(blockIdx.x) * groups + group; row < args.rows;
         row += int64_t(gridDim.x) * groups, turn ^= 1) {
        float grad[Vector] = {}, standard[Vector] = {}, stream[Vector] = {};
        const float mean = args.mean[row], rstd = args.rstd[row];
        float sum = 0.0f, product = 0.0f;
        if (active) {
            load_floats<Vector>(args.grad_normed + row * args.grad_normed_stride + column, grad);
            load_floats<Vector>(args.summed + row * args.summed_stride + column, standard);
            if (args.grad_summed != nullptr) {
                load_floats<Vector>(args.grad_summed + row * args.grad_summed_stride + column,
                                    stream);
            }
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                standard[j] = (standard[j] - mean) * rstd;
                grad_weight[j] += grad[j] * standard[j];
                grad_bias[j] += grad[j];
                grad[j] *= weight[j];
                sum += grad[j];
                product += grad[j] * standard[j];
            }
        }
        sum = warp_sum(sum);
        product = warp_sum(product);
        float* mine = exchange + turn * warps * 2;
        if (thread % 32 == 0) {
            mine[thread / 32 * 2] = sum;
            mine[thread / 32 * 2 + 1] = product;
        }
        named_barrier_sync(1 + group, Threads);
        sum = product = 0.0f;
#pragma unroll
        for (int warp = 0; warp < warps; ++warp) {
            sum += mine[warp * 2];
            product += mine[warp * 2 + 1];
        }
        sum /= float(columns);
        product /= float(columns);
        if (active) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                stream[j] += rstd * (grad[j] - sum - standard[j] * product);
            }
            store_floats<Vector>(args.grad_input + row * columns + column, stream);
        }
    }

    // One group after the other adds to what the block has collected.
    for (int turn_of = 0; turn_of < groups; ++turn_of) {
        if (group == turn_of && active) {
#pragma unroll
            for (int j = 0; j < Vector; ++j) {
                float* of_weight = collected + column + j;
                float* of_bias = collected + columns + column + j;
                *of_weight = grad_weight[j] + (turn_of == 0 ? 0.0f : *of_weight);
                *of_bias = grad_bias[j] + (turn_of == 0 ? 0.0f : *of_bias);
            }
        }
        __syncthreads();
    }
    float* partials = args.partials + int64_t(blockIdx.x) * 2 * columns;
    for (int i = threadIdx.x; i < 2 * columns; i += layer_norm_backward_threads) {
        partials[i] = collected[i];
    }
}

// Rows of any width and alignment: the gradient of the input only.
template <typename G, typename R, typename W>
__global__ void __launch_bounds__(layer_norm_any_threads)
    layer_norm_backward_any(const LayerNormGradients<G, R, W> args) {
    GPT2FAST_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);
    constexpr int warps = layer_norm_any_threads / 32;
    const int64_t row = blockIdx.x;
    const int columns = args.columns;
    const G* grad_normed = args.grad_normed + row * args.grad_normed_stride;
    const R* summed = args.summed + row * args.summed_stride;
    const float mean = args.mean[row], rstd = args.rstd[row];
    float sum = 0.0f, product = 0.0f;
    for (int column = threadIdx.x; column < columns; column += layer_norm_any_threads) {
        const float grad = to_float(grad_normed[column]) * to_float(args.weight[column]);
        sum += grad;
        product += grad * (to_float(summed[column]) - mean) * rstd;
    }
    sum = block_sum<layer_norm_any_threads>(sum, sums) / float(columns);
    product = block_sum<layer_norm_any_threads>(product, sums + warps) / float(columns);
    for (int column = threadIdx.x; column < columns; column += layer_norm_any_threads) {
        const float grad = to_float(grad_normed[column]) * to_float(args.weight[column]);
        const float standard = (to_float(summed[column]) - mean) * rstd;
        float result = rstd * (grad - sum - standard * product);
        if (args.grad_summed != nullptr) {
            result += to_float(args.grad_summed[row * args.grad_summed_stride + column]);
        }
        args.grad_input[row * columns + column] = from_float<R>(result);
    }
}

// The sums for weight and bias over the rows of block y, a column a thread.
template <typename G, typename R, typename W>
__global__ void __launch_bounds__(layer_norm_any_threads)
    layer_norm_parameters_any(const LayerNormGradients<G, R, W> args) {
    const int column = int(blockIdx.x) * layer_norm_any_threads + int(threadIdx.x);
    if (column >= args.columns) return;
    float grad_weight = 0.0f, grad_bias = 0.0f;
    for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
        const float grad = to_float(args.grad_normed[row * args.grad_normed_stride + column]);
        const float standard =
            (to_float(args.summed[row * args.summed_stride + column]) - args.mean[row]) *
            args.rstd[row];
        grad_weight += grad * standard;
        grad_bias += grad;
    }
    float* partials = args.partials + int64_t(blockIdx.y) * 2 * args.columns;
    partials[column] = grad_weight;
    partials[args.columns + column] = grad_bias;
}

}  // namespace gpt2fast::kernels
