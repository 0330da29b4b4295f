// Vectors of 16 floats: AVX-512 F, BW, DQ, VL, VNNI unless GPT2FAST_WITHOUT_VNNI is set, and BF16
// where GPT2FAST_AVX512_BF16 is.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace gpt2fast::GPT2FAST_ISA {

struct Mask {
    __mmask16 m;
};

struct Vec {
    static constexpr int width = 16;
    __m512 v;

    Vec() = default;
    Vec(__m512 x) : v(x) {}
    explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

    static __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
    static Vec load(const float16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    }
    static Vec load(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static Vec load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
    // The first n < 16 elements; the others are zero and their memory is not touched.
    static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static Vec load(const bfloat16* p, int n) {
        return widen(_mm256_maskz_loadu_epi16(first(n), p));
    }
    static Vec load(const int8_t* p, int n) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
    }

    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(bfloat16* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
    void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
    void store(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
    // Nearest integers (ties to even), saturated.
    void store(int8_t* p) const {
        _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
    }

    static __m512 widen(__m256i x) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    __m256i narrow() const {
#ifdef GPT2FAST_AVX512_BF16
        // The instruction flushes subnormal inputs; they are far below what rounding loses.
        return (__m256i)_mm512_cvtneps_pbh(v);
#else
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(
            _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
    }
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
// NaN in a is lost, in b it stays.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec round(Vec a) {
    return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for integral n.
inline Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Element i of the result is the sum of x[i]'s elements.
inline Vec reduce_add_each(const Vec (&x)[16]) {
    __m512 fours[4];
    for (int i = 0; i < 4; ++i) {
        __m512 twos[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 a = x[4 * i + 2 * j].v, b = x[4 * i + 2 * j + 1].v;
            twos[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const __m512d a = _mm512_castps_pd(twos[0]), b = _mm512_castps_pd(twos[1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 eights[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        eights[i] =
            _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                         _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_mov_ps(no.v, m.m, yes.v); }
inline uint32_t bits(Mask m) { return m.m; }

// 16 words of 4 bytes: one float, two bfloat16, or four int8 each.
struct Words {
    __m512i v;
    static Words load(const void* p) { return {_mm512_loadu_si512(p)}; }
    static Words broadcast(const void* p) {
        int32_t word;
        std::memcpy(&word, p, 4);
        return {_mm512_set1_epi32(word)};
    }
};

// 16 int32 sums.
struct IntVec {
    __m512i v;
    IntVec() = default;
    explicit IntVec(int32_t x) : v(_mm512_set1_epi32(x)) {}
    IntVec(__m512i x) : v(x) {}
    Vec to_float() const { return _mm512_cvtepi32_ps(v); }
};

inline IntVec operator+(IntVec a, IntVec b) { return _mm512_add_epi32(a.v, b.v); }

inline Vec dot_float32(Vec sum, Words w, Words x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w.v), _mm512_castsi512_ps(x.v), sum.v);
}

inline Vec dot_bfloat16(Vec sum, Words w, Words x) {
#ifdef GPT2FAST_AVX512_BF16
    return _mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)x.v);
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    const __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16)),
                                        _mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16)), sum.v);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w.v, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(x.v, high)), even);
#endif
}

// What dot_int8 subtracts from each unsigned byte of w.
constexpr int dot_offset = 0;

// Unsigned bytes of w times signed bytes of x. Without VNNI the odd and even bytes are widened
// first: in 16 bits 255 * 127 * 2 would saturate.
inline IntVec dot_int8(IntVec sum, Words w, Words x) {
#ifdef GPT2FAST_WITHOUT_VNNI
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w.v, low),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_srai_epi16(x.v, 8));
    return _mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd));
#else
    // Not the intrinsic: GCC copies each sum there and back around it.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
    return sum;
#endif
}

// Whether the processor multiplies bfloat16, and sums products of four bytes.
#ifdef GPT2FAST_AVX512_BF16
constexpr bool multiplies_bfloat16 = true;
#else
constexpr bool multiplies_bfloat16 = false;
#endif
constexpr bool multiplies_bytes = true;

// Signed bytes + 128, as unsigned ones.
inline Words flip_signs(Words w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8(char(0x80)))}; }
// The first and second bfloat16 of each word.
inline Vec even_halves(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16)); }
inline Vec odd_halves(Words w) {
    return _mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32(int(0xffff0000))));
}

// The low and high halves of each byte.
inline Words low_nibbles(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
inline Words high_nibbles(Words w) {
    return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))};
}

}  // namespace gpt2fast::GPT2FAST_ISA

#include "byte_dots.h"
