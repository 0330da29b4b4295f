// GELU of a sum with a bias (Hendrycks & Gimpel, 2016, tanh form).
//
// Reads and writes each element once: 8 bytes of traffic an element in float32, 4 in bfloat16.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

template <typename T>
void bias_gelu_rows(const BiasGelu& args, int64_t begin, int64_t end) {
    const T* bias = static_cast<const T*>(args.bias);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
        T* out = static_cast<T*>(args.out) + row * args.columns;
        int64_t j = 0;
        for (; j + Vec::width <= args.columns; j += Vec::width) {
            gelu(Vec::load(x + j) + Vec::load(bias + j)).store(out + j);
        }
        if (const int rest = int(args.columns - j)) {
            gelu(Vec::load(x + j, rest) + Vec::load(bias + j, rest)).store(out + j, rest);
        }
    }
}

inline void bias_gelu(const BiasGelu& args, int64_t begin, int64_t end) {
    if (args.dtype == DType::float32) {
        bias_gelu_rows<float>(args, begin, end);
    } else {
        bias_gelu_rows<bfloat16>(args, begin, end);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
