// Elementary functions on vectors.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

// e^x within 2 units in the last place. Cody & Waite: x = n ln 2 + r, |r| <= ln(2) / 2, then a
// polynomial of degree 6 for e^r. Results below 2^-126 may be flushed; x >= 89 gives infinity.
inline Vec exp(Vec x) {
    // Both bounds leave NaN as it is.
    x = max(Vec(-104.0f), min(Vec(89.0f), x));
    const Vec n = round(x * Vec(1.44269504088896341f));
    Vec r = fma(n, Vec(-0.693359375f), x);
    r = fma(n, Vec(2.12194440e-4f), r);
    Vec p(1.9875691500e-4f);
    p = fma(p, r, Vec(1.3981999507e-3f));
    p = fma(p, r, Vec(8.3334519073e-3f));
    p = fma(p, r, Vec(4.1665795894e-2f));
    p = fma(p, r, Vec(1.6666665459e-1f));
    p = fma(p, r, Vec(5.0000001201e-1f));
    p = fma(p, r * r, r + Vec(1.0f));
    return scale_by_power(p, n);
}

// tanh(x) = 1 - 2 / (e^2x + 1); for small |x|, where that cancels, an odd polynomial.
inline Vec tanh(Vec x) {
    const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(x + x) + Vec(1.0f));
    const Vec s = x * x;
    Vec p(-5.70498872745e-3f);
    p = fma(p, s, Vec(2.06390887954e-2f));
    p = fma(p, s, Vec(-5.37397155531e-2f));
    p = fma(p, s, Vec(1.33314422036e-1f));
    p = fma(p, s, Vec(-3.33332819422e-1f));
    const Vec near = fma(p * s, x, x);
    return select(abs(x) < Vec(0.625f), near, far);
}

// As common/gelu.h has it.
inline Vec gelu(Vec z) {
    const Vec u = z * fma(z * z, Vec(gelu_scale * gelu_cubic), Vec(gelu_scale));
    return z / (Vec(1.0f) + exp(Vec(-2.0f) * u));
}

// Elements of a where bit `stage` of their place is clear and those of b, moved down by `stage`
// places, where it is set; with `upper`, a's are moved and b's are not. A header whose vectors are
// several has its own.
template <int stage, bool upper, typename V, int... l>
V exchange(V a, V b, std::integer_sequence<int, l...>) {
    constexpr int width = V::width;
#if defined(__clang__)
    return V(__builtin_shufflevector(
        a.v, b.v, ((l & stage) ? width + l - (upper ? 0 : stage) : l + (upper ? stage : 0))...));
#else
    typedef int Places __attribute__((vector_size(4 * width)));
    return V(__builtin_shuffle(
        a.v, b.v,
        Places{((l & stage) ? width + l - (upper ? 0 : stage) : l + (upper ? stage : 0))...}));
#endif
}

// rows[i] element j <-> rows[j] element i, by bits of i and j.
template <int stage = 1>
void transpose(Vec* rows) {
    using Places = std::make_integer_sequence<int, Vec::width>;
    for (int i = 0; i < Vec::width; ++i) {
        if (i & stage) continue;
        const Vec a = rows[i], b = rows[i + stage];
        rows[i] = exchange<stage, false>(a, b, Places());
        rows[i + stage] = exchange<stage, true>(a, b, Places());
    }
    if constexpr (2 * stage < Vec::width) transpose<2 * stage>(rows);
}

}  // namespace gpt2fast::GPT2FAST_ISA
