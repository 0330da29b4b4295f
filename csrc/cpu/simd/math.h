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

// z / 2 * (1 + tanh(u)) = z / (1 + e^-2u), u = sqrt(2 / pi) (z + 0.044715 z^3).
inline Vec gelu(Vec z) {
    const Vec u = z * fma(z * z, Vec(0.0356774081f), Vec(0.7978845608f));
    return z / (Vec(1.0f) + exp(Vec(-2.0f) * u));
}

}  // namespace gpt2fast::GPT2FAST_ISA
