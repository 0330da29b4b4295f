// Residual add and layer normalization (Ba et al., 2016), forward and backward.
//
// A row is read from memory once and stays in the first cache for the passes that follow: sum,
// variance, result. Bytes of an element in float32, with a residual: forward 8 read and 8 written,
// backward 12 read (two gradients, the sum) and 4 written; in bfloat16 half of that. At the speed
// of memory that is all there is: some ten operations an element hide behind it.
//
// The gradients of weight and bias are summed over fixed blocks of rows, then over the blocks in
// their order: they don't depend on the number of threads.
#pragma once

#include "rows.h"

namespace gpt2fast::GPT2FAST_ISA {

// X, R, W: types of x and the result, of the residual and the sum, of weight and bias.
template <typename X, typename R, typename W>
void layer_norm_rows(const LayerNorm& args, int64_t begin, int64_t end) {
    const int64_t columns = args.columns;
    const W* weight = static_cast<const W*>(args.weight);
    const W* bias = static_cast<const W*>(args.bias);
    for (int64_t row = begin; row < end; ++row) {
        const X* x = static_cast<const X*>(args.x) + row * args.x_stride;
        X* normed = static_cast<X*>(args.normed) + row * columns;

        const auto normalize = [&](const auto* summed, float total) {
            float mean = total / float(columns);
            Sum deviation, square;
            for_columns(columns, [&](int64_t j, auto step, auto chain) {
                const Vec d = covered(load(summed + j, step) - Vec(mean), step);
                deviation.v[chain] = deviation.v[chain] + d;
                square.v[chain] = fma(d, d, square.v[chain]);
            });
            // The rounding error of the mean is the mean of the deviations from it.
            const float correction = deviation.total() / float(columns);
            mean += correction;
            const float variance =
                std::max(0.0f, square.total() / float(columns) - correction * correction);
            const float rstd = 1.0f / std::sqrt(variance + args.eps);
            args.mean[row] = mean;
            args.rstd[row] = rstd;
            for_columns(columns, [&](int64_t j, auto step, auto) {
                const Vec standard = (load(summed + j, step) - Vec(mean)) * Vec(rstd);
                store(fma(standard, load(weight + j, step), load(bias + j, step)), normed + j,
                      step);
            });
        };

        Sum total;
        if (args.residual == nullptr) {
            for_columns(columns, [&](int64_t j, auto step, auto chain) {
                total.v[chain] = total.v[chain] + load(x + j, step);
            });
            normalize(x, total.total());
        } else {
            const R* residual = static_cast<const R*>(args.residual) + row * args.residual_stride;
            R* summed = static_cast<R*>(args.summed) + row * columns;
            for_columns(columns, [&](int64_t j, auto step, auto chain) {
                store(load(residual + j, step) + load(x + j, step), summed + j, step);
                total.v[chain] = total.v[chain] + load(summed + j, step);  // rounded
            });
            normalize(summed, total.total());
        }
    }
}

inline void layer_norm(const LayerNorm& args, int64_t begin, int64_t end) {
    with_type(args.x_dtype, [&](auto* x) {
        with_type(args.residual_dtype, [&](auto* residual) {
            with_type(args.weight_dtype, [&](auto* weight) {
                layer_norm_rows<std::remove_pointer_t<decltype(x)>,
                                std::remove_pointer_t<decltype(residual)>,
                                std::remove_pointer_t<decltype(weight)>>(args, begin, end);
            });
        });
    });
}

// G, R, W: types of the result's gradient, of the sum and its gradients, of the weight.
template <typename G, typename R, typename W>
void layer_norm_backward_blocks(const LayerNormBackward& args, int64_t begin, int64_t end) {
    const int64_t columns = args.columns;
    const W* weight = static_cast<const W*>(args.weight);
    for (int64_t block = begin; block < end; ++block) {
        float* grad_weight = args.sums + 2 * block * columns;
        float* grad_bias = grad_weight + columns;
        std::memset(grad_weight, 0, 2 * size_t(columns) * sizeof(float));
        for (int64_t row = args.blocks.begin(block); row < args.blocks.begin(block + 1); ++row) {
            const G* grad = static_cast<const G*>(args.grad) + row * args.grad_stride;
            const R* summed = static_cast<const R*>(args.summed) + row * args.summed_stride;
            R* out = static_cast<R*>(args.grad_input) + row * columns;
            const Vec mean(args.mean[row]), rstd(args.rstd[row]);
            Sum sum, product;
            for_columns(columns, [&](int64_t j, auto step, auto chain) {
                const Vec g = load(grad + j, step);
                const Vec standard = (load(summed + j, step) - mean) * rstd;
                const Vec weighted = g * load(weight + j, step);
                sum.v[chain] = sum.v[chain] + weighted;
                product.v[chain] = fma(weighted, standard, product.v[chain]);
                store(fma(g, standard, load(grad_weight + j, step)), grad_weight + j, step);
                store(load(grad_bias + j, step) + g, grad_bias + j, step);
            });
            const Vec mean_sum(sum.total() / float(columns));
            const Vec mean_product(product.total() / float(columns));
            const auto differentiate = [&](auto added) {
                for_columns(columns, [&](int64_t j, auto step, auto) {
                    const Vec standard = (load(summed + j, step) - mean) * rstd;
                    const Vec weighted = load(grad + j, step) * load(weight + j, step);
                    const Vec centered = weighted - mean_sum - standard * mean_product;
                    store(fma(rstd, centered, added(j, step)), out + j, step);
                });
            };
            if (args.grad_summed == nullptr) {
                differentiate([](int64_t, auto) { return Vec(0.0f); });
            } else {
                const R* added =
                    static_cast<const R*>(args.grad_summed) + row * args.grad_summed_stride;
                differentiate([&](int64_t j, auto step) { return load(added + j, step); });
            }
        }
    }
}

inline void layer_norm_backward(const LayerNormBackward& args, int64_t begin, int64_t end) {
    with_type(args.grad_dtype, [&](auto* grad) {
        with_type(args.summed_dtype, [&](auto* summed) {
            with_type(args.weight_dtype, [&](auto* weight) {
                layer_norm_backward_blocks<std::remove_pointer_t<decltype(grad)>,
                                           std::remove_pointer_t<decltype(summed)>,
                                           std::remove_pointer_t<decltype(weight)>>(args, begin,
                                                                                    end);
            });
        });
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
