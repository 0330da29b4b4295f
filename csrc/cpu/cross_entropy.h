// Rows of logits to losses and gradients, in place.
//
//     loss[n]      = logsumexp(logits[n, :]) - logits[n, target]
//     gradient[n,] = (softmax(logits[n, :]) - onehot(target)) * factor
//
// A row of GPT-2's vocabulary is 201 kB in float32: it comes from memory once, stays in the second
// cache between the two passes, and goes back once. Two exponentials an element; the matrix
// products around this kernel are 4,600 operations an element.
#pragma once

#include "rows.h"

namespace gpt2fast::GPT2FAST_ISA {

// Logits whose largest is found before they are summed.
constexpr int64_t logit_block = 2048;

template <typename T>
void cross_entropy_rows(const CrossEntropy& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        T* logits = static_cast<T*>(args.logits) + row * args.columns;
        const int64_t target = args.targets[row];
        if (target == args.ignore_index) {
            args.losses[row] = 0.0f;
            if (args.differentiate) std::memset(logits, 0, size_t(args.columns) * sizeof(T));
            continue;
        }
        const float picked = to_float(logits[target]);
        float largest = std::numeric_limits<float>::lowest(), total = 0.0f;
        for (int64_t first = 0; first < args.columns; first += logit_block) {
            const int64_t size = std::min(logit_block, args.columns - first);
            const float before = largest;
            Vec most[chains] = {Vec(largest), Vec(largest), Vec(largest), Vec(largest)};
            const int64_t whole = size / Vec::width * Vec::width;
            for_columns(whole, [&](int64_t j, auto step, auto chain) {
                most[chain] = max(most[chain], load(logits + first + j, step));
            });
            largest = reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
            for (int64_t j = whole; j < size; ++j) {
                largest = std::max(largest, to_float(logits[first + j]));
            }
            Sum sum;
            for_columns(size, [&](int64_t j, auto step, auto chain) {
                const Vec weight = exp(load(logits + first + j, step) - Vec(largest));
                sum.v[chain] = sum.v[chain] + covered(weight, step);
            });
            total = total * std::exp(before - largest) + sum.total();
        }
        const float lse = largest + std::log(total);
        args.losses[row] = lse - picked;
        if (!args.differentiate) continue;
        for_columns(args.columns, [&](int64_t j, auto step, auto) {
            const Vec weight = exp(load(logits + j, step) - Vec(lse));
            store(weight * Vec(args.factor), logits + j, step);
        });
        gpt2fast::assign(logits[target], (std::exp(picked - lse) - 1.0f) * args.factor);
    }
}

inline void cross_entropy(const CrossEntropy& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        cross_entropy_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
