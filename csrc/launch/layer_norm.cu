#include "layer_norm.h"

#include <algorithm>

#include "../kernels/layer_norm.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

// Calls function(x, residual, weight) with the types of one of the combinations that exist: all
// alike; half-precision branches beside a float32 stream or float32 weights, as under autocast.
template <typename Function>
void with_types(DType x, DType residual, DType weight, Function function) {
    if (!layer_norm_takes(x, residual, weight)) {
        throw std::invalid_argument("no layer norm kernel for this mixture of dtypes");
    }
    with_float(x, [&](auto branch) {
        using X = typename decltype(branch)::type;
        const TypeOf<float> wide;
        if (weight == x) return function(branch, branch, branch);
        if constexpr (!std::is_same_v<X, float>) {
            if (residual == x) return function(branch, branch, wide);
            return function(branch, wide, wide);
        }
    });
}

bool rows_are_aligned(const void* data, int64_t columns, int64_t stride, DType dtype) {
    return is_vector_aligned(data, columns, stride, size_of(dtype));
}

// Elements that one thread takes at once: 16 bytes of the narrowest dtype.
template <typename X>
constexpr int vector_of = 16 / int(sizeof(X));

template <int Columns, typename X, typename R, typename W>
void launch_forward(const LayerNormRows<X, R, W>& args, cudaStream_t stream) {
    constexpr int vector = vector_of<X>;
    device::launch(&kernels::layer_norm_forward<X, R, W, vector, Columns / (32 * vector)>,
                   dim3(unsigned(ceil_div(args.rows, layer_norm_rows_per_block))),
                   dim3(32 * layer_norm_rows_per_block), 0, stream, args);
}

template <int Columns, typename G, typename R, typename W>
void launch_backward(const LayerNormGradients<G, R, W>& args, int64_t blocks, cudaStream_t stream) {
    const size_t shared =
        (size_t(layer_norm_backward_threads) / 32 * 4 + 2 * size_t(args.columns)) * sizeof(float);
    constexpr int vector = vector_of<G>;
    device::launch(&kernels::layer_norm_backward<G, R, W, vector, Columns / vector>,
                   dim3(unsigned(blocks)), dim3(layer_norm_backward_threads), shared, stream, args);
}

}  // namespace

bool layer_norm_takes(DType x, DType residual, DType weight) {
    if (x == DType::int8) return false;
    if (x == residual && x == weight) return true;
    return x != DType::float32 && weight == DType::float32 &&
           (residual == x || residual == DType::float32);
}

int64_t layer_norm_partials(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 264); }

void layer_norm_forward(const LayerNormForward& args, void* stream) {
    with_types(args.x_dtype, args.residual_dtype, args.weight_dtype,
               [&](auto x, auto residual, auto weight) {
                   using X = typename decltype(x)::type;
                   using R = typename decltype(residual)::type;
                   using W = typename decltype(weight)::type;
                   const LayerNormRows<X, R, W> rows{static_cast<const X*>(args.x),
                                                     static_cast<const R*>(args.residual),
                                                     static_cast<const W*>(args.weight),
                                                     static_cast<const W*>(args.bias),
                                                     static_cast<X*>(args.normed),
                                                     static_cast<R*>(args.summed),
                                                     args.mean,
                                                     args.rstd,
                                                     args.rows,
                                                     int(args.columns),
                                                     args.x_stride,
                                                     args.residual_stride,
                                                     args.eps};
                   const bool aligned =
                       rows_are_aligned(args.x, args.columns, args.x_stride, args.x_dtype) &&
                       rows_are_aligned(args.residual, args.columns, args.residual_stride,
                                        args.residual_dtype) &&
                       rows_are_aligned(args.weight, args.columns, 0, args.weight_dtype) &&
                       rows_are_aligned(args.bias, args.columns, 0, args.weight_dtype);
                   if (aligned && args.columns <= 1024)
                       return launch_forward<1024>(rows, stream_of(stream));
                   if (aligned && args.columns <= 2048)
                       return launch_forward<2048>(rows, stream_of(stream));
                   device::launch(&layer_norm_forward_any<X, R, W>, dim3(unsigned(args.rows)),
                                  dim3(layer_norm_any_threads),
                                  2 * layer_norm_any_threads / 32 * sizeof(float),
                                  stream_of(stream), rows);
               });
}

void layer_norm_backward(const LayerNormBackward& args, void* stream) {
    with_types(
        args.grad_dtype, args.summed_dtype, args.weight_dtype,
        [&](auto grad, auto summed, auto weight) {
            using G = typename decltype(grad)::type;
            using R = typename decltype(summed)::type;
            using W = typename decltype(weight)::type;
            const LayerNormGradients<G, R, W> rows{static_cast<const G*>(args.grad_normed),
                                                   static_cast<const R*>(args.grad_summed),
                                                   static_cast<const R*>(args.summed),
                                                   args.mean,
                                                   args.rstd,
                                                   static_cast<const W*>(args.weight),
                                                   static_cast<R*>(args.grad_input),
                                                   args.partials,
                                                   args.rows,
                                                   int(args.columns),
                                                   args.grad_normed_stride,
                                                   args.grad_summed_stride,
                                                   args.summed_stride};
            const bool aligned = rows_are_aligned(args.grad_normed, args.columns,
                                                  args.grad_normed_stride, args.grad_dtype) &&
                                 rows_are_aligned(args.grad_summed, args.columns,
                                                  args.grad_summed_stride, args.summed_dtype) &&
                                 rows_are_aligned(args.summed, args.columns, args.summed_stride,
                                                  args.summed_dtype) &&
                                 rows_are_aligned(args.weight, args.columns, 0, args.weight_dtype);
            const int64_t blocks = layer_norm_partials(args.rows);
            if (aligned && args.columns <= 1024) {
                launch_backward<1024>(rows, blocks, stream_of(stream));
            } else if (aligned && args.columns <= 2048) {
                launch_backward<2048>(rows, blocks, stream_of(stream));
            } else {
                device::launch(&layer_norm_backward_any<G, R, W>, dim3(unsigned(args.rows)),
                               dim3(layer_norm_any_threads),
                               2 * layer_norm_any_threads / 32 * sizeof(float), stream_of(stream),
                               rows);
                device::launch(&layer_norm_parameters_any<G, R, W>,
                               dim3(unsigned(ceil_div(args.columns, layer_norm_any_threads)),
                                    unsigned(blocks)),
                               dim3(layer_norm_any_threads), 0, stream_of(stream), rows);
            }
            // grad_weight and grad_bias are two halves of one row of sums.
            device::launch(
                &sum_partials<W>, dim3(unsigned(ceil_div(2 * args.columns, sum_rows_columns))),
                dim3(sum_rows_columns * sum_rows_strips),
                sum_rows_columns * sum_rows_strips * sizeof(float), stream_of(stream),
                args.partials, static_cast<W*>(args.grad_weight), static_cast<W*>(args.grad_bias),
                args.columns, blocks, 2 * args.columns, 2 * args.columns);
        });
}

}  // namespace gpt2fast::launch
