// Attention of single queries to a cache: what each decoding step does for every sequence.
//
// Keys and values in use are read once each. Per entry of 64 bytes: one load, one or two products,
// three operations of the sums over 16 entries at a time, and for the values a multiply-add a
// vector, after widening where they are not float32.
#pragma once

#include "gemm.h"

namespace gpt2fast::GPT2FAST_ISA {

// One head's keys or values: entry t begins at data + t * stride.
template <typename T>
struct Entries {
    const T* data;
    int64_t stride;
};

// One query, in the type in which its products with keys are computed: float32 beside float32
// entries, bfloat16 beside bfloat16, int8 with one scale beside int8. Heads whose size does not fill
// whole vectors of words are computed in float32 whatever the entries are.
template <typename T>
struct Query {
    static constexpr int word_inputs = 4 / sizeof(T);
    static constexpr int vector_inputs = word_inputs * Vec::width;

    const float* q;
    int head_dim;
    bool whole;          // whether head_dim is a multiple of vector_inputs
    float scale = 1.0f;  // on every product
    float offset = 0.0f;  // what to add to every product before
    alignas(64) uint8_t words[512];

    Query(const float* q, int head_dim)
        : q(q),
          head_dim(head_dim),
          whole(!std::is_same_v<T, float> && head_dim % vector_inputs == 0 &&
                size_t(head_dim) * sizeof(T) <= sizeof words) {
        if (!whole) return;
        if constexpr (std::is_same_v<T, bfloat16>) {
            for (int d = 0; d < head_dim; d += Vec::width) {
                Vec::load(q + d).store(reinterpret_cast<bfloat16*>(words) + d);
            }
        } else if constexpr (std::is_same_v<T, int8_t>) {
            Vec largest(0.0f);
            for (int d = 0; d < head_dim; d += Vec::width) {
                largest = max(largest, abs(Vec::load(q + d)));
            }
            const float most = reduce_max(largest);
            const Vec inverse(most > 0.0f ? 127.0f / most : 0.0f);
            int8_t* narrow = reinterpret_cast<int8_t*>(words);
            for (int d = 0; d < head_dim; d += Vec::width) {
                (Vec::load(q + d) * inverse).store(narrow + d);
            }
            int sum = 0;
            for (int d = 0; d < head_dim; ++d) sum += narrow[d];
            // Keys enter as unsigned bytes, 128 too large.
            offset = -128.0f * float(sum);
            scale = most / 127.0f;
        }
    }

    // Products with one key, to be summed over the elements.
    Vec times(const T* key) const {
        if constexpr (!std::is_same_v<T, float>) {
            if (whole) {
                const uint8_t* bytes = reinterpret_cast<const uint8_t*>(key);
                const int size = head_dim * int(sizeof(T));
                if constexpr (std::is_same_v<T, bfloat16>) {
                    Vec sum(0.0f);
                    for (int i = 0; i < size; i += 4 * Vec::width) {
                        sum = dot_bfloat16(sum, Words::load(bytes + i), Words::load(words + i));
                    }
                    return sum;
                } else {
                    IntVec sum(0);
                    for (int i = 0; i < size; i += 4 * Vec::width) {
                        sum = dot_int8(sum, flip_signs(Words::load(bytes + i)),
                                       Words::load(words + i));
                    }
                    return sum.to_float();
                }
            }
        }
        Vec even(0.0f), odd(0.0f);
        int d = 0;
        for (; d + 2 * Vec::width <= head_dim; d += 2 * Vec::width) {
            even = fma(Vec::load(q + d), Vec::load(key + d), even);
            odd = fma(Vec::load(q + d + Vec::width), Vec::load(key + d + Vec::width), odd);
        }
        for (; d < head_dim; d += Vec::width) {
            const int n = std::min(Vec::width, head_dim - d);
            even = fma(Vec::load(q + d, n), Vec::load(key + d, n), even);
        }
        return even + odd;
    }
};

// Entries ahead of the one at work that memory is asked for.
constexpr int entries_ahead = 12;

inline void prefetch_range(const void* begin, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const uint8_t*>(begin) + i);
}

// out = sum over t of weights[t] * entry t, for `vectors` x width elements. bfloat16 entries are
// read as words, the even and the odd elements apart.
template <typename T, int vectors>
void sum_entries(Entries<T> v, int64_t entries, const float* weights, float* out) {
    constexpr int size = vectors * Vec::width;
    Vec sum[vectors];
    for (int c = 0; c < vectors; ++c) sum[c] = Vec(0.0f);
    for (int64_t t = 0; t < entries; ++t) {
        const T* value = v.data + t * v.stride;
        prefetch_range(value + entries_ahead * v.stride, size * int64_t(sizeof(T)));
        const Vec weight(weights[t]);
        if constexpr (std::is_same_v<T, bfloat16> && vectors % 2 == 0) {
            for (int c = 0; c < vectors; c += 2) {
                const Words both = Words::load(value + c * Vec::width);
                sum[c] = fma(weight, even_halves(both), sum[c]);
                sum[c + 1] = fma(weight, odd_halves(both), sum[c + 1]);
            }
        } else {
            for (int c = 0; c < vectors; ++c) {
                sum[c] = fma(weight, Vec::load(value + c * Vec::width), sum[c]);
            }
        }
    }
    if constexpr (std::is_same_v<T, bfloat16> && vectors % 2 == 0) {
        for (int c = 0; c < vectors; c += 2) {
            float even[Vec::width], odd[Vec::width];
            sum[c].store(even);
            sum[c + 1].store(odd);
            for (int i = 0; i < Vec::width; ++i) {
                out[c * Vec::width + 2 * i] = even[i];
                out[c * Vec::width + 2 * i + 1] = odd[i];
            }
        }
    } else {
        for (int c = 0; c < vectors; ++c) sum[c].store(out + c * Vec::width);
    }
}

// Attention of one query to the first `entries` entries: memory is read once, keys then values.
// `weights` is scratch for that many floats. int8 entries have a scale each, `scale_stride` apart.
template <typename T>
void attend_one(const float* q, int64_t entries, Entries<T> k, const float* k_scales, Entries<T> v,
                const float* v_scales, int64_t scale_stride, int head_dim, float scale,
                float* weights, float* out) {
    constexpr bool scaled = std::is_same_v<T, int8_t>;
    constexpr int width = Vec::width;
    const Query<T> query(q, head_dim);
    const Vec factor(scale * query.scale);
    Vec largest(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < entries; t += width) {
        const int n = int(std::min<int64_t>(width, entries - t));
        Vec products[width];
        float scales[width] = {};
        for (int i = 0; i < width; ++i) {
            // Past the last entry the last one again: its score is left out below.
            const int64_t at = t + std::min(i, n - 1);
            const T* key = k.data + at * k.stride;
            prefetch_range(key + entries_ahead * k.stride, head_dim * int64_t(sizeof(T)));
            products[i] = query.times(key);
            if (scaled) scales[i] = k_scales[at * scale_stride];
        }
        Vec score = (reduce_add_each(products) + Vec(query.offset)) * factor;
        if (scaled) score = score * Vec::load(scales);
        score.store(weights + t, n);
        largest = max(largest, score);
    }
    const Vec most(reduce_max(largest));
    Vec sums(0.0f);
    int64_t t = 0;
    for (; t + width <= entries; t += width) {
        const Vec weight = exp(Vec::load(weights + t) - most);
        weight.store(weights + t);
        sums = sums + weight;
    }
    float total = reduce_add(sums);
    if (const int n = int(entries - t)) {
        exp(Vec::load(weights + t, n) - most).store(weights + t, n);
        for (int i = 0; i < n; ++i) total += weights[t + i];
    }
    const float inverse = 1.0f / total;
    for (t = 0; t < entries; ++t) {
        weights[t] *= scaled ? inverse * v_scales[t * scale_stride] : inverse;
    }
    int d = 0;
    for (; d + 4 * width <= head_dim; d += 4 * width) {
        sum_entries<T, 4>({v.data + d, v.stride}, entries, weights, out + d);
    }
    for (; d + width <= head_dim; d += width) {
        sum_entries<T, 1>({v.data + d, v.stride}, entries, weights, out + d);
    }
    if (const int n = head_dim - d) {
        Vec sum(0.0f);
        for (t = 0; t < entries; ++t) {
            sum = fma(Vec(weights[t]), Vec::load(v.data + t * v.stride + d, n), sum);
        }
        sum.store(out + d, n);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
