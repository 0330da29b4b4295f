#include "mlp.h"

#include "../kernels/mlp.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

dim3 grid(int64_t rows, int64_t columns, int vector) {
    return dim3(unsigned(ceil_div(columns, bias_gelu_threads * vector)),
                unsigned(row_partials(rows)));
}

template <typename T>
void add_partials(const float* partials, T* out, int64_t rows, int64_t columns,
                  cudaStream_t stream) {
    device::launch(&sum_partials<T>, dim3(unsigned(ceil_div(columns, sum_rows_columns))),
                   dim3(sum_rows_columns * sum_rows_strips),
                   sum_rows_columns * sum_rows_strips * sizeof(float), stream, partials, out,
                   static_cast<T*>(nullptr), columns, row_partials(rows), columns, columns);
}

}  // namespace

int64_t row_partials(int64_t rows) { return ceil_div(rows, bias_gelu_rows); }

void bias_gelu(const BiasGelu& args, void* stream) {
    const int64_t bytes = size_of(args.dtype);
    const bool aligned = is_vector_aligned(args.x, args.columns, args.x_stride, bytes) &&
                         is_vector_aligned(args.bias, args.columns, 0, bytes);
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        device::launch(&bias_gelu_forward<T, decltype(vector)::value>,
                       grid(args.rows, args.columns, vector), dim3(bias_gelu_threads), 0,
                       device::stream_of(stream), static_cast<const T*>(args.x),
                       static_cast<const T*>(args.bias), static_cast<T*>(args.out), args.rows,
                       int(args.columns), args.x_stride);
    });
}

void bias_gelu_backward(const BiasGeluBackward& args, void* stream) {
    const int64_t bytes = size_of(args.dtype);
    const bool aligned = is_vector_aligned(args.x, args.columns, args.x_stride, bytes) &&
                         is_vector_aligned(args.grad, args.columns, args.grad_stride, bytes) &&
                         is_vector_aligned(args.bias, args.columns, 0, bytes);
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        device::launch(&kernels::bias_gelu_backward<T, decltype(vector)::value>,
                       grid(args.rows, args.columns, vector), dim3(bias_gelu_threads), 0,
                       device::stream_of(stream), static_cast<const T*>(args.grad),
                       static_cast<const T*>(args.x), static_cast<const T*>(args.bias),
                       static_cast<T*>(args.grad_x), static_cast<T*>(args.activated), args.partials,
                       args.rows, int(args.columns), args.grad_stride, args.x_stride);
        add_partials(args.partials, static_cast<T*>(args.grad_bias), args.rows, args.columns,
                     device::stream_of(stream));
    });
}

void sum_rows(const SumRows& args, void* stream) {
    const bool aligned =
        is_vector_aligned(args.x, args.columns, args.x_stride, size_of(args.dtype));
    with_vector(args.dtype, aligned, [&](auto type, auto vector) {
        using T = typename decltype(type)::type;
        device::launch(&kernels::sum_rows<T, decltype(vector)::value>,
                       grid(args.rows, args.columns, vector), dim3(bias_gelu_threads), 0,
                       device::stream_of(stream), static_cast<const T*>(args.x), args.partials,
                       args.rows, int(args.columns), args.x_stride);
        add_partials(args.partials, static_cast<T*>(args.out), args.rows, args.columns,
                     device::stream_of(stream));
    });
}

}  // namespace gpt2fast::launch
