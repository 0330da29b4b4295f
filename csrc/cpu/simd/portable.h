// Vectors of 4 floats in the compiler's own terms: any processor that GCC or Clang knows.
#pragma once

#include <cmath>

#include "../types.h"

namespace gpt2fast::GPT2FAST_ISA {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t UInts __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct Mask {
    Ints m;
};

struct Vec {
    static constexpr int width = 4;
    Floats v;

    Vec() = default;
    Vec(Floats x) : v(x) {}
    explicit Vec(float x) : v(Floats{x, x, x, x}) {}

    template <typename T>
    static Vec load(const T* p) {
        return load(p, width);
    }
    static Vec load(const float* p) {
        Vec x;
        std::memcpy(&x.v, p, sizeof x.v);
        return x;
    }
    static Vec load(const float16* p) {
        Halves bits;
        std::memcpy(&bits, p, sizeof bits);
        const UInts x = __builtin_convertvector(bits, UInts), rest = x & 0x7fffu;
        const UInts moved = (rest << 13) + (112u << 23);  // the exponent's bias is 127, not 15
        // What is below 2^-14 has no leading one: as if it had, and then without it.
        const UInts small = UInts(Floats(moved + (1u << 23)) - 0x1p-14f);
        const UInts large = moved + (112u << 23);  // infinity and NaN keep the largest exponent
        const UInts below = UInts(rest < 0x0400u), above = UInts(rest >= 0x7c00u);
        const UInts found = (small & below) | (large & above) | (moved & ~(below | above));
        return Floats(found | (x & 0x8000u) << 16);
    }
    static Vec load(const int8_t* p) {
        return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    }
    static Vec load(const int32_t* p) {
        return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    }
    // The first n elements; the others are zero and their memory is not touched.
    template <typename T>
    static Vec load(const T* p, int n) {
        Vec x(0.0f);
        for (int i = 0; i < n; ++i) x.v[i] = to_float(p[i]);
        return x;
    }
    static Vec load(const int8_t* p, int n) {
        Vec x(0.0f);
        for (int i = 0; i < n; ++i) x.v[i] = float(p[i]);
        return x;
    }

    template <typename T>
    void store(T* p) const {
        store(p, width);
    }
    void store(float* p) const { std::memcpy(p, &v, sizeof v); }
    template <typename T>
    void store(T* p, int n) const {
        for (int i = 0; i < n; ++i) assign(p[i], v[i]);
    }
    // Nearest integers (ties to even), saturated.
    void store(int8_t* p) const {
        for (int i = 0; i < width; ++i) {
            const float x = std::nearbyint(v[i]);
            p[i] = int8_t(x > 127.0f ? 127.0f : x < -128.0f ? -128.0f : x);
        }
    }
};

inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec sqrt(Vec a) {
    for (int i = 0; i < Vec::width; ++i) a.v[i] = std::sqrt(a.v[i]);
    return a;
}
inline Vec abs(Vec a) { return Floats((UInts)a.v & 0x7fffffffu); }
inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
inline Vec select(Mask m, Vec yes, Vec no) {
    return Floats((m.m & (Ints)yes.v) | (~m.m & (Ints)no.v));
}
inline uint32_t bits(Mask m) {
    return uint32_t((m.m[0] & 1) | (m.m[1] & 2) | (m.m[2] & 4) | (m.m[3] & 8));
}
// NaN in a is lost, in b it stays.
inline Vec max(Vec a, Vec b) { return select(b < a, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
// To the nearest integer, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline Vec round(Vec a) {
    const Vec shift(12582912.0f);
    return (a + shift) - shift;
}
// a * 2^n for integral n in [-252, 254]: in two steps, since 2^n itself may leave the range.
inline Vec scale_by_power(Vec a, Vec n) {
    const Ints power = __builtin_convertvector(n.v, Ints);
    const Ints half = power >> 1;
    return Vec(a.v * Floats((half + 127) << 23) * Floats((power - half + 127) << 23));
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline float reduce_max(Vec a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
}

// Element i of the result is the sum of x[i]'s elements.
inline Vec reduce_add_each(const Vec (&x)[4]) {
    return Floats{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])};
}

// 4 words of 4 bytes: one float, two bfloat16, or four int8 each.
struct Words {
    UInts v;
    static Words load(const void* p) {
        Words w;
        std::memcpy(&w.v, p, sizeof w.v);
        return w;
    }
    static Words broadcast(const void* p) {
        uint32_t word;
        std::memcpy(&word, p, 4);
        return {UInts{word, word, word, word}};
    }
};

// 4 int32 sums.
struct IntVec {
    Ints v;
    IntVec() = default;
    explicit IntVec(int32_t x) : v(Ints{x, x, x, x}) {}
    IntVec(Ints x) : v(x) {}
    Vec to_float() const { return __builtin_convertvector(v, Floats); }
};

inline IntVec operator+(IntVec a, IntVec b) { return a.v + b.v; }

inline Vec dot_float32(Vec sum, Words w, Words x) { return (Floats)w.v * (Floats)x.v + sum.v; }

inline Vec dot_bfloat16(Vec sum, Words w, Words x) {
    const Floats even = Floats(w.v << 16) * Floats(x.v << 16) + sum.v;
    return Floats(w.v & 0xffff0000u) * Floats(x.v & 0xffff0000u) + even;
}

// What dot_int8 subtracts from each unsigned byte of w.
constexpr int dot_offset = 0;

// Unsigned bytes of w times signed bytes of x.
inline IntVec dot_int8(IntVec sum, Words w, Words x) {
    for (int i = 0; i < 32; i += 8) {
        sum.v += Ints((w.v >> i) & 0xffu) * (Ints(x.v << (24 - i)) >> 24);
    }
    return sum;
}

// Signed bytes + 128, as unsigned ones.
inline Words flip_signs(Words w) { return {w.v ^ 0x80808080u}; }
// The first and second bfloat16 of each word.
inline Vec even_halves(Words w) { return Floats(w.v << 16); }
inline Vec odd_halves(Words w) { return Floats(w.v & 0xffff0000u); }

// Whether the processor multiplies bfloat16, and sums products of four bytes.
constexpr bool multiplies_bfloat16 = false, multiplies_bytes = true;

// The low and high halves of each byte.
inline Words low_nibbles(Words w) { return {w.v & 0x0f0f0f0fu}; }
inline Words high_nibbles(Words w) { return {(w.v >> 4) & 0x0f0f0f0fu}; }

}  // namespace gpt2fast::GPT2FAST_ISA

#include "byte_dots.h"
