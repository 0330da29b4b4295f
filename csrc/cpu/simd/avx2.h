// Vectors of 8 floats: AVX2, FMA and F16C, and AVX-VNNI where GPT2FAST_AVX_VNNI is set.
#pragma once

#include <immintrin.h>

#include "../types.h"

namespace gpt2fast::GPT2FAST_ISA {

struct Mask {
    __m256 m;
};

struct Vec {
    static constexpr int width = 8;
    __m256 v;

    Vec() = default;
    Vec(__m256 x) : v(x) {}
    explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

    static __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static Vec load(const bfloat16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
    static Vec load(const float16* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    static Vec load(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    static Vec load(const int32_t* p) {
        return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p));
    }
    // The first n < 8 elements; the others are zero and their memory is not touched.
    static Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
    static Vec load(const bfloat16* p, int n) {
        bfloat16 buffer[width] = {};
        std::memcpy(buffer, p, size_t(n) * sizeof(bfloat16));
        return load(buffer);
    }
    static Vec load(const int8_t* p, int n) {
        int8_t buffer[width] = {};
        std::memcpy(buffer, p, size_t(n));
        return load(buffer);
    }

    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(bfloat16* p) const { _mm_storeu_si128((__m128i*)p, narrow()); }
    void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
    void store(bfloat16* p, int n) const {
        bfloat16 buffer[width];
        store(buffer);
        std::memcpy(p, buffer, size_t(n) * sizeof(bfloat16));
    }
    // Nearest integers (ties to even), saturated.
    void store(int8_t* p) const {
        const __m256i wide = _mm256_cvtps_epi32(v);
        const __m128i half =
            _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(half, half));
    }

    static __m256 widen(__m128i x) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
    __m128i narrow() const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i chosen =
            _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(
                                  _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan)),
                              16);
        return _mm_packus_epi32(_mm256_castsi256_si128(chosen),
                                _mm256_extracti128_si256(chosen, 1));
    }
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec abs(Vec a) {
    return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
// NaN in a is lost, in b it stays.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec round(Vec a) {
    return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for integral n in [-126, 127].
inline __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// a * 2^n for integral n in [-252, 254]: in two steps, since 2^n itself may leave the range.
inline Vec scale_by_power(Vec a, Vec n) {
    const __m256i power = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(power, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a.v, power_of_two(half)),
                         power_of_two(_mm256_sub_epi32(power, half)));
}
inline float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Element i of the result is the sum of x[i]'s elements.
inline Vec reduce_add_each(const Vec (&x)[8]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m.m); }
inline uint32_t bits(Mask m) { return uint32_t(_mm256_movemask_ps(m.m)); }

// 8 words of 4 bytes: one float, two bfloat16, or four int8 each.
struct Words {
    __m256i v;
    static Words load(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
    static Words broadcast(const void* p) {
        int32_t word;
        std::memcpy(&word, p, 4);
        return {_mm256_set1_epi32(word)};
    }
};

// 8 int32 sums.
struct IntVec {
    __m256i v;
    IntVec() = default;
    explicit IntVec(int32_t x) : v(_mm256_set1_epi32(x)) {}
    IntVec(__m256i x) : v(x) {}
    Vec to_float() const { return _mm256_cvtepi32_ps(v); }
};

inline IntVec operator+(IntVec a, IntVec b) { return _mm256_add_epi32(a.v, b.v); }

inline Vec dot_float32(Vec sum, Words w, Words x) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(w.v), _mm256_castsi256_ps(x.v), sum.v);
}

inline Vec dot_bfloat16(Vec sum, Words w, Words x) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    const __m256 even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w.v, 16)),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(x.v, 16)), sum.v);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w.v, high)),
                           _mm256_castsi256_ps(_mm256_and_si256(x.v, high)), even);
}

// What dot_int8 subtracts from each unsigned byte of w.
constexpr int dot_offset = 0;

// Unsigned bytes of w times signed bytes of x. Without VNNI the products of two bytes are summed in
// 16 bits, where 255 * 127 * 2 would saturate: the odd and even bytes are widened first.
inline IntVec dot_int8(IntVec sum, Words w, Words x) {
#ifdef GPT2FAST_AVX_VNNI
    // Not the intrinsic: GCC copies each sum there and back around it.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v) : "x"(w.v), "x"(x.v));
    return sum;
#else
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w.v, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x.v, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w.v, 8), _mm256_srai_epi16(x.v, 8));
    return _mm256_add_epi32(sum.v, _mm256_add_epi32(even, odd));
#endif
}

// Whether the processor multiplies bfloat16, and sums products of four bytes.
constexpr bool multiplies_bfloat16 = false;
#ifdef GPT2FAST_AVX_VNNI
constexpr bool multiplies_bytes = true;
#else
constexpr bool multiplies_bytes = false;

// Keeps the compiler from adding products to each other before it adds them to the sums: it would
// run out of registers.
inline void keep_order(__m256i& sum) { asm("" : "+x"(sum)); }

template <bool odd, int R, int C>
inline void add_half_bytes(IntVec (&sums)[R][C], const uint8_t* panel, const uint8_t* tile) {
    __m256i w[C];
    for (int c = 0; c < C; ++c) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)panel + c);
        w[c] = odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
    }
    for (int r = 0; r < R; ++r) {
        const __m256i x = Words::broadcast(tile + 4 * r).v;
        for (int c = 0; c < C; ++c) {
            sums[r][c].v = _mm256_add_epi32(sums[r][c].v, _mm256_madd_epi16(w[c], x));
            keep_order(sums[r][c].v);
        }
    }
}

// Adds the products of a word of each of some columns, unsigned bytes, with a word of each of some
// rows, which widen_bytes made two: the even bytes first, as 16-bit numbers, then the odd ones.
template <int R, int C>
inline void add_bytes(IntVec (&sums)[R][C], const uint8_t* panel, const uint8_t* tile) {
    add_half_bytes<false>(sums, panel, tile);
    add_half_bytes<true>(sums, panel, tile + 4 * R);
}

// Words of two nibbles a byte whose products are summed before they are widened: in 16 bits the
// sum of eight pairs of products is at most 8 * 2 * 15 * 127.
constexpr int nibble_words = 4;

struct NibbleSums {
    __m256i v;

    void begin(const IntVec&) { v = _mm256_setzero_si256(); }
    void add(Words nibbles, Words x) {
        v = _mm256_add_epi16(v, _mm256_maddubs_epi16(nibbles.v, x.v));
        keep_order(v);
    }
    // The sum before, and what was added.
    IntVec end(IntVec before) const { return before + _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
};
#endif

// Signed bytes + 128, as unsigned ones.
inline Words flip_signs(Words w) { return {_mm256_xor_si256(w.v, _mm256_set1_epi8(char(0x80)))}; }
// The first and second bfloat16 of each word.
inline Vec even_halves(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w.v, 16)); }
inline Vec odd_halves(Words w) {
    return _mm256_castsi256_ps(_mm256_and_si256(w.v, _mm256_set1_epi32(int(0xffff0000))));
}

// The low and high halves of each byte.
inline Words low_nibbles(Words w) { return {_mm256_and_si256(w.v, _mm256_set1_epi8(15))}; }
inline Words high_nibbles(Words w) {
    return {_mm256_and_si256(_mm256_srli_epi16(w.v, 4), _mm256_set1_epi8(15))};
}

}  // namespace gpt2fast::GPT2FAST_ISA

#ifdef GPT2FAST_AVX_VNNI
#include "byte_dots.h"
#endif
