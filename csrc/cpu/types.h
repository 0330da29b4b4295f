// Elements of 16 bits, and conversions; arithmetic is always float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

namespace gpt2fast {

// The upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

// IEEE 754 binary16.
struct float16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline float to_float(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t rest = x.bits & 0x7fff;
    uint32_t bits;
    float y;
    if (rest < 0x0400) {  // zero or subnormal: rest * 2^-24
        y = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &y, 4);
    } else if (rest >= 0x7c00) {
        bits = 0x7f800000 | (rest << 13);
    } else {
        bits = (rest + (112u << 10)) << 13;
    }
    bits |= sign;
    std::memcpy(&y, &bits, 4);
    return y;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bfloat16 to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline void assign(float& to, float from) { to = from; }
inline void assign(bfloat16& to, float from) { to = to_bfloat16(from); }

}  // namespace gpt2fast
