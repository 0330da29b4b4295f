// Vectors of 8 floats as two of 4: NEON on AArch64, with dot products of signed bytes where
// GPT2FAST_NEON_DOTPROD is set, and of unsigned by signed ones where GPT2FAST_NEON_I8MM is.
#pragma once

#include <arm_neon.h>

#include "../types.h"

namespace gpt2fast::GPT2FAST_ISA {

struct Mask {
    uint32x4_t low, high;
};

struct Vec {
    static constexpr int width = 8;
    float32x4_t low, high;

    Vec() = default;
    Vec(float32x4_t low, float32x4_t high) : low(low), high(high) {}
    explicit Vec(float x) : low(vdupq_n_f32(x)), high(low) {}

    static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static Vec load(const bfloat16* p) {
        const uint16x8_t x = vld1q_u16(&p->bits);
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
    }
    static Vec load(const float16* p) {
        const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
        return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
    }
    static Vec load(const int8_t* p) {
        const int16x8_t x = vmovl_s8(vld1_s8(p));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
    }
    static Vec load(const int32_t* p) {
        return {vcvtq_f32_s32(vld1q_s32(p)), vcvtq_f32_s32(vld1q_s32(p + 4))};
    }
    // The first n < 8 elements; the others are zero and their memory is not touched.
    template <typename T>
    static Vec load(const T* p, int n) {
        T buffer[width] = {};
        std::memcpy(buffer, p, size_t(n) * sizeof(T));
        return load(buffer);
    }

    void store(float* p) const {
        vst1q_f32(p, low);
        vst1q_f32(p + 4, high);
    }
    void store(bfloat16* p) const { vst1q_u16(&p->bits, vcombine_u16(narrow(low), narrow(high))); }
    // Nearest integers (ties to even), saturated.
    void store(int8_t* p) const {
        const int16x8_t x =
            vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(low)), vqmovn_s32(vcvtnq_s32_f32(high)));
        vst1_s8(p, vqmovn_s16(x));
    }
    template <typename T>
    void store(T* p, int n) const {
        T buffer[width];
        store(buffer);
        std::memcpy(p, buffer, size_t(n) * sizeof(T));
    }

    // To bfloat16: nearest, ties to even; NaN stays NaN.
    static uint16x4_t narrow(float32x4_t x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
    }
};

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }

inline Mask operator<(Vec a, Vec b) { return {vcltq_f32(a.low, b.low), vcltq_f32(a.high, b.high)}; }
inline Vec select(Mask m, Vec yes, Vec no) {
    return {vbslq_f32(m.low, yes.low, no.low), vbslq_f32(m.high, yes.high, no.high)};
}
inline uint32_t bits(Mask m) {
    const uint32x4_t places = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m.low, places)) | vaddvq_u32(vandq_u32(m.high, places)) << 4;
}
// NaN in a is lost, in b it stays.
inline Vec max(Vec a, Vec b) { return select(b < a, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec round(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }

// 2^n for integral n in [-126, 127].
inline float32x4_t power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline float32x4_t scale_by_power(float32x4_t a, float32x4_t n) {
    const int32x4_t power = vcvtnq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(power, 1);
    return vmulq_f32(vmulq_f32(a, power_of_two(half)), power_of_two(vsubq_s32(power, half)));
}
// a * 2^n for integral n in [-252, 254]: in two steps, since 2^n itself may leave the range.
inline Vec scale_by_power(Vec a, Vec n) {
    return {scale_by_power(a.low, n.low), scale_by_power(a.high, n.high)};
}
inline float reduce_add(Vec a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
inline float reduce_max(Vec a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }

// Element i of the result is the sum of x[i]'s elements.
inline Vec reduce_add_each(const Vec (&x)[8]) {
    const auto pair = [&](int i) {
        return vpaddq_f32(vaddq_f32(x[i].low, x[i].high), vaddq_f32(x[i + 1].low, x[i + 1].high));
    };
    return {vpaddq_f32(pair(0), pair(2)), vpaddq_f32(pair(4), pair(6))};
}

// The exchange of math.h.
template <int stage, bool upper>
Vec exchange(Vec a, Vec b, std::integer_sequence<int, 0, 1, 2, 3, 4, 5, 6, 7>) {
    if constexpr (stage == 4) return upper ? Vec(a.high, b.high) : Vec(a.low, b.low);
    const auto quads = [](float32x4_t x, float32x4_t y) {
        if constexpr (stage == 1) return upper ? vtrn2q_f32(x, y) : vtrn1q_f32(x, y);
        const float64x2_t v = vreinterpretq_f64_f32(x), w = vreinterpretq_f64_f32(y);
        return vreinterpretq_f32_f64(upper ? vtrn2q_f64(v, w) : vtrn1q_f64(v, w));
    };
    return {quads(a.low, b.low), quads(a.high, b.high)};
}

// 8 words of 4 bytes: one float, two bfloat16, or four int8 each.
struct Words {
    uint32x4_t low, high;

    static Words load(const void* p) {
        // By bytes: a panel's words may lie anywhere.
        const uint8_t* bytes = static_cast<const uint8_t*>(p);
        return {vreinterpretq_u32_u8(vld1q_u8(bytes)), vreinterpretq_u32_u8(vld1q_u8(bytes + 16))};
    }
    static Words broadcast(const void* p) {
        uint32_t word;
        std::memcpy(&word, p, 4);
        return {vdupq_n_u32(word), vdupq_n_u32(word)};
    }
};

// 8 int32 sums.
struct IntVec {
    int32x4_t low, high;

    IntVec() = default;
    explicit IntVec(int32_t x) : low(vdupq_n_s32(x)), high(low) {}
    IntVec(int32x4_t low, int32x4_t high) : low(low), high(high) {}
    Vec to_float() const { return {vcvtq_f32_s32(low), vcvtq_f32_s32(high)}; }
};

inline IntVec operator+(IntVec a, IntVec b) {
    return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)};
}

inline Vec dot_float32(Vec sum, Words w, Words x) {
    return {vfmaq_f32(sum.low, vreinterpretq_f32_u32(w.low), vreinterpretq_f32_u32(x.low)),
            vfmaq_f32(sum.high, vreinterpretq_f32_u32(w.high), vreinterpretq_f32_u32(x.high))};
}

// The first and second bfloat16 of each word.
inline Vec even_halves(Words w) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(w.low, 16)),
            vreinterpretq_f32_u32(vshlq_n_u32(w.high, 16))};
}
inline Vec odd_halves(Words w) {
    const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    return {vreinterpretq_f32_u32(vandq_u32(w.low, mask)),
            vreinterpretq_f32_u32(vandq_u32(w.high, mask))};
}

inline Vec dot_bfloat16(Vec sum, Words w, Words x) {
    return fma(odd_halves(w), odd_halves(x), fma(even_halves(w), even_halves(x), sum));
}

// Signed bytes + 128, as unsigned ones.
inline Words flip_signs(Words w) {
    const uint32x4_t signs = vdupq_n_u32(0x80808080u);
    return {veorq_u32(w.low, signs), veorq_u32(w.high, signs)};
}

// What dot_int8 subtracts from each unsigned byte of w: without I8MM the products are of signed
// bytes.
#ifdef GPT2FAST_NEON_I8MM
constexpr int dot_offset = 0;
#else
constexpr int dot_offset = 128;
#endif

// Bytes of w, less dot_offset, times signed bytes of x, none of which is -128.
inline int32x4_t dot_int8(int32x4_t sum, uint32x4_t w, uint32x4_t x) {
    const int8x16_t b = vreinterpretq_s8_u32(x);
#ifdef GPT2FAST_NEON_I8MM
    return vusdotq_s32(sum, vreinterpretq_u8_u32(w), b);
#else
    const int8x16_t a = vreinterpretq_s8_u32(veorq_u32(w, vdupq_n_u32(0x80808080u)));
#ifdef GPT2FAST_NEON_DOTPROD
    return vdotq_s32(sum, a, b);
#else
    // Two products, at most 128 * 127 each, fit into 16 bits.
    const int16x8_t pairs =
        vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return vpadalq_s16(sum, pairs);
#endif
#endif
}
inline IntVec dot_int8(IntVec sum, Words w, Words x) {
    return {dot_int8(sum.low, w.low, x.low), dot_int8(sum.high, w.high, x.high)};
}

// Whether the processor multiplies bfloat16, and sums products of four bytes.
constexpr bool multiplies_bfloat16 = false, multiplies_bytes = true;

// The low and high halves of each byte.
inline Words low_nibbles(Words w) {
    const uint32x4_t mask = vdupq_n_u32(0x0f0f0f0fu);
    return {vandq_u32(w.low, mask), vandq_u32(w.high, mask)};
}
inline Words high_nibbles(Words w) {
    return low_nibbles({vshrq_n_u32(w.low, 4), vshrq_n_u32(w.high, 4)});
}

}  // namespace gpt2fast::GPT2FAST_ISA

#include "byte_dots.h"
