// AdamW (Loshchilov & Hutter, 2019) over many tensors in one pass.
//
// An element of float32 is 16 bytes read and 12 written, of bfloat16 half, with moments alone in
// bfloat16 12 and 8; a root and a division for every 16 elements take a third of the time that
// memory needs for them.
#pragma once

#include "rows.h"

namespace gpt2fast::GPT2FAST_ISA {

// T, M: types of the parameter and its gradient, and of the moments.
template <typename T, typename M>
void update(const AdamW& args, const AdamWPiece& piece) {
    T* param = static_cast<T*>(piece.param);
    const T* grad = static_cast<const T*>(piece.grad);
    M* first = static_cast<M*>(piece.first);
    M* second = static_cast<M*>(piece.second);
    const Vec beta1(args.beta1), beta2(args.beta2), eps(args.eps), kept(args.kept);
    const Vec rest1(args.rest1), rest2(args.rest2), unbiasing(args.unbiasing), rate(-args.rate);
    for_columns(piece.size, [&](int64_t j, auto step, auto) {
        const Vec g = load(grad + j, step);
        const Vec m = fma(beta1, load(first + j, step), rest1 * g);
        const Vec v = fma(beta2, load(second + j, step), rest2 * g * g);
        const Vec spread = fma(sqrt(v), unbiasing, eps);
        store(m, first + j, step);
        store(v, second + j, step);
        store(fma(rate, m / spread, load(param + j, step) * kept), param + j, step);
    });
}

inline void adamw(const AdamW& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        with_type(args.pieces[i].dtype, [&](auto* type) {
            with_type(args.pieces[i].moment_dtype, [&](auto* moment) {
                update<std::remove_pointer_t<decltype(type)>,
                       std::remove_pointer_t<decltype(moment)>>(args, args.pieces[i]);
            });
        });
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
