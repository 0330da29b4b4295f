// GELU of a sum with a bias (Hendrycks & Gimpel, 2016, tanh form).
//
// Reads and writes each element once: 8 bytes of traffic an element in float32, 4 in bfloat16. The
// backward pass reads two tensors and writes one, or two where the activation is wanted again: it
// comes with the slope, from the same exponential. The exponential is about half of some twenty
// operations an element; a core computes those faster than memory delivers.
#pragma once

#include "rows.h"

namespace gpt2fast::GPT2FAST_ISA {

template <typename T>
void bias_gelu_rows(const BiasGelu& args, int64_t begin, int64_t end) {
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        T* out = static_cast<T*>(args.out) + row * args.columns;
        for_columns(args.columns, [&](int64_t j, auto step, auto) {
            store(gelu(load(x + j, step) + load(bias + j, step)), out + j, step);
        });
    }
}

inline void bias_gelu(const BiasGelu& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        bias_gelu_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

// With s = 1 / (1 + e^-2u): gelu = z s, slope = s + 2 z s (1 - s) u'.
template <typename T>
void bias_gelu_backward_blocks(const BiasGeluBackward& args, int64_t begin, int64_t end) {
    const int64_t columns = args.columns;
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t block = begin; block < end; ++block) {
        float* sums = args.sums + block * columns;
        std::memset(sums, 0, size_t(columns) * sizeof(float));
        for (int64_t row = args.blocks.begin(block); row < args.blocks.begin(block + 1); ++row) {
            const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
            const T* grad = static_cast<const T*>(args.grad) + row * args.grad_stride;
            T* grad_x = static_cast<T*>(args.grad_x) + row * columns;
            const auto differentiate = [&](auto keep) {
                for_columns(columns, [&](int64_t j, auto step, auto) {
                    const Vec z = load(x + j, step) + load(bias + j, step);
                    const Vec square = z * z;
                    const Vec u = z * fma(square, Vec(gelu_scale * gelu_cubic), Vec(gelu_scale));
                    const Vec s = Vec(1.0f) / (Vec(1.0f) + exp(Vec(-2.0f) * u));
                    const Vec twice =
                        fma(square, Vec(6 * (gelu_scale * gelu_cubic)), Vec(2 * gelu_scale));
                    const Vec activated = z * s;
                    const Vec slope = fma(activated * (Vec(1.0f) - s), twice, s);
                    const Vec product = load(grad + j, step) * slope;
                    keep(activated, j, step);
                    store(product, grad_x + j, step);
                    store(load(sums + j, step) + product, sums + j, step);
                });
            };
            if (args.activated == nullptr) {
                differentiate([](Vec, int64_t, auto) {});
            } else {
                T* out = static_cast<T*>(args.activated) + row * columns;
                differentiate([&](Vec y, int64_t j, auto step) { store(y, out + j, step); });
            }
        }
    }
}

inline void bias_gelu_backward(const BiasGeluBackward& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        bias_gelu_backward_blocks<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
