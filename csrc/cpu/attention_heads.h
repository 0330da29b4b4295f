// Attention of single queries to a cache: what each decoding step does for every sequence.
//
// Traffic: the keys and values in use, once each. Per key a product a vector and about three
// operations of the sums of 16 keys at a time; per value a multiply-add a vector, after widening
// where it is not float32.
//
// Entry by entry, the keys of up to 16 heads before the next, values 8 entries at a time: head by
// head, each a strided walk through the cache, 32 rows of 129 bfloat16 entries were read at 16 GB/s
// beside 29 that the memory gives (2 cores of an EPYC, Zen 4).
#pragma once

#include "gemm.h"

namespace gpt2fast::GPT2FAST_ISA {

// One head's keys or values: entry t begins at data + t * stride.
template <typename T>
struct Entries {
    const T* data;
    int64_t stride;
};

// Neighboring heads' keys or values: entry t of head h begins at data + t * stride + h * head_dim.
// int8 entries have factors, that of entry t of head h at scales[t * scale_stride + h].
template <typename T>
struct CachedHeads {
    const T* data;
    int64_t stride;
    const float* scales;
    int64_t scale_stride;
};

// One query, in the type in which its products with keys are computed: float32 beside float32
// entries, bfloat16 beside bfloat16, int8 with one scale beside int8. Heads whose size does not
// fill whole vectors of words are computed in float32 whatever the entries are.
template <typename T>
struct Query {
    static constexpr int word_inputs = 4 / sizeof(T);
    static constexpr int vector_inputs = word_inputs * Vec::width;

    const float* q;
    int head_dim;
    bool whole;    // whether head_dim is a multiple of vector_inputs
    float scale;   // on every product
    float offset;  // what to add to every product before
    alignas(64) uint8_t words[512];

    void prepare(const float* query, int size) {
        q = query;
        head_dim = size;
        whole = !std::is_same_v<T, float> && head_dim % vector_inputs == 0 &&
                size_t(head_dim) * sizeof(T) <= sizeof words;
        scale = 1.0f;
        offset = 0.0f;
        if (!whole) return;
        if constexpr (std::is_same_v<T, bfloat16>) {
            for (int d = 0; d < head_dim; d += Vec::width) {
                Vec::load(q + d).store(reinterpret_cast<bfloat16*>(words) + d);
            }
        } else if constexpr (std::is_same_v<T, int8_t>) {
            const NarrowGroup made = narrow_group(q, head_dim, reinterpret_cast<int8_t*>(words));
            // Keys enter as unsigned bytes, 128 too large.
            offset = float(dot_offset - 128) * float(made.sum);
            scale = made.scale;
        }
    }

    // Products with one key, to be summed over the elements. `vectors` is that many of a head's, or
    // 0 where the compiler does not know.
    template <int vectors>
    Vec times(const T* key) const {
        if constexpr (!std::is_same_v<T, float>) {
            if (vectors > 0 || whole) {
                const uint8_t* bytes = reinterpret_cast<const uint8_t*>(key);
                const int count = vectors > 0 ? vectors : head_dim / vector_inputs;
                Vec sum(0.0f);
                IntVec dots(0);
                for (int i = 0; i < count; ++i) {
                    const Words from = Words::load(bytes + 4 * Vec::width * i);
                    const Words with = Words::load(words + 4 * Vec::width * i);
                    if constexpr (std::is_same_v<T, bfloat16>) {
                        sum = dot_bfloat16(sum, from, with);
                    } else {
                        dots = dot_int8(dots, flip_signs(from), with);
                    }
                }
                return std::is_same_v<T, bfloat16> ? sum : dots.to_float();
            }
        }
        const int size = vectors > 0 ? vectors * vector_inputs : head_dim;
        Vec even(0.0f), odd(0.0f);
        int d = 0;
        for (; d + 2 * Vec::width <= size; d += 2 * Vec::width) {
            even = fma(Vec::load(q + d), Vec::load(key + d), even);
            odd = fma(Vec::load(q + d + Vec::width), Vec::load(key + d + Vec::width), odd);
        }
        for (; d < size; d += Vec::width) {
            const int n = std::min(Vec::width, size - d);
            even = fma(Vec::load(q + d, n), Vec::load(key + d, n), even);
        }
        return even + odd;
    }
};

// How many entries ahead to prefetch, so that they are 8 KB away.
inline int64_t entries_ahead(int64_t entry_bytes) {
    return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, entry_bytes));
}

// Into the second-level cache: in the first, prefetched lines would evict the entries that are in
// use. Only of entries that there are: behind them lie pages that nothing has touched yet, and a
// prefetch from those walks the page tables for nothing.
inline void prefetch_range(const void* begin, int64_t bytes) {
    const auto* next = static_cast<const uint8_t*>(begin);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
}

// sums += weights[t] * entry t over some entries, for `vectors` x width elements. bfloat16 entries
// are read as words, so that the sums of two vectors hold the even and the odd elements. Beside
// each of the first `asked` entries the one `ahead` elements behind it is prefetched.
template <typename T, int vectors>
inline void add_entries(const T* data, int64_t stride, int count, const float* weights,
                        int64_t ahead, int asked, float* sums) {
    Vec sum[vectors];
    for (int c = 0; c < vectors; ++c) sum[c] = Vec::load(sums + c * Vec::width);
    for (int t = 0; t < count; ++t) {
        const T* value = data + t * stride;
        if (t < asked) prefetch_range(value + ahead, vectors * Vec::width * int64_t(sizeof(T)));
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
    for (int c = 0; c < vectors; ++c) sum[c].store(sums + c * Vec::width);
}

constexpr int value_vectors = 4;  // vectors of one head that are summed at once

// The same for a whole head.
template <typename T>
inline void add_head(const T* data, int64_t stride, int count, const float* weights, int64_t ahead,
                     int asked, int head_dim, float* sums) {
    int d = 0;
    for (; d + value_vectors * Vec::width <= head_dim; d += value_vectors * Vec::width) {
        add_entries<T, value_vectors>(data + d, stride, count, weights, ahead, asked, sums + d);
    }
    for (; d + Vec::width <= head_dim; d += Vec::width) {
        add_entries<T, 1>(data + d, stride, count, weights, ahead, asked, sums + d);
    }
    if (const int n = head_dim - d) {
        Vec sum = Vec::load(sums + d, n);
        for (int t = 0; t < count; ++t) {
            sum = fma(Vec(weights[t]), Vec::load(data + t * stride + d, n), sum);
        }
        sum.store(sums + d, n);
    }
}

// Brings even and odd sums of add_entries into the order of the elements.
template <typename T>
inline void order_head(int head_dim, float* sums) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        constexpr int both = 2 * Vec::width;
        const int whole = head_dim / (value_vectors * Vec::width) * value_vectors * Vec::width;
        for (int d = 0; d < whole; d += both) {
            float apart[both];
            std::memcpy(apart, sums + d, sizeof apart);
            for (int i = 0; i < Vec::width; ++i) {
                sums[d + 2 * i] = apart[i];
                sums[d + 2 * i + 1] = apart[Vec::width + i];
            }
        }
    }
}

// Heads whose scores are computed in one pass over the keys.
constexpr int heads_at_once = 16;
// Entries whose values are added to one head before the next.
constexpr int entries_at_once = 8;

// Floats of scratch that attend_heads needs.
inline int64_t attend_heads_scratch(int64_t heads, int64_t entries) {
    return std::min<int64_t>(heads, heads_at_once) * (entries + Vec::width);
}

// Of a head's attention to a part of the entries: the largest score, and the sum of all weights
// e^(score - largest).
struct PartSum {
    float largest, total;
};

// products[h][i] = those of the query of head h with entry i of `count`, whose keys begin at
// `keys`; beside each of the first `asked` entries the one `ahead` elements behind it is
// prefetched.
template <typename T, int vectors>
void multiply_entries(const Query<T>* queries, int heads, const T* keys, int64_t stride, int count,
                      int64_t ahead, int asked, Vec (*products)[Vec::width]) {
    const int dim = vectors > 0 ? vectors * Query<T>::vector_inputs : queries->head_dim;
    for (int i = 0; i < count; ++i, keys += stride) {
        for (int h = 0; h < heads; ++h) {
            const T* key = keys + h * dim;
            if (i < asked) prefetch_range(key + ahead, dim * int64_t(sizeof(T)));
            products[h][i] = queries[h].template times<vectors>(key);
        }
    }
}

// multiply_entries for heads of any size; sizes 64 and 128 are known to the compiler.
template <typename T>
auto multiply_entries_for(int head_dim) {
    constexpr int inputs = Query<T>::vector_inputs;
    if (head_dim == 64) return multiply_entries<T, 64 / inputs>;
    if (head_dim == 128) return multiply_entries<T, 128 / inputs>;
    return multiply_entries<T, 0>;
}

// Attention of one query of each of some heads, which lie side by side in q and out as in the
// cache, to the first `entries` entries. The heads take turns with every few entries, so that
// memory is read in the order in which it lies. With `sums`, one for each head, these are a part of
// the entries only: out holds sums of weighted values, to be added to other parts' by add_parts.
template <typename T>
void attend_heads(const float* q, int heads, int64_t entries, CachedHeads<T> k, CachedHeads<T> v,
                  int head_dim, float scale, float* scratch, float* out, PartSum* sums = nullptr) {
    constexpr bool scaled = std::is_same_v<T, int8_t>;
    constexpr int width = Vec::width;
    const int64_t row = entries + width;  // floats of a head's weights
    const auto multiply = multiply_entries_for<T>(head_dim);
    const int64_t keys_ahead = entries_ahead(k.stride * int64_t(sizeof(T)));
    const int64_t values_ahead = entries_ahead(v.stride * int64_t(sizeof(T)));
    for (int first = 0; first < heads; first += heads_at_once) {
        const int count = std::min(heads_at_once, heads - first);
        Query<T> queries[heads_at_once];
        Vec largest[heads_at_once];
        for (int h = 0; h < count; ++h) {
            queries[h].prepare(q + (first + h) * head_dim, head_dim);
            largest[h] = Vec(-std::numeric_limits<float>::infinity());
        }
        for (int64_t t = 0; t < entries; t += width) {
            const int n = int(std::min<int64_t>(width, entries - t));
            Vec products[heads_at_once][width];
            multiply(queries, count, k.data + t * k.stride + first * head_dim, k.stride, n,
                     keys_ahead * k.stride,
                     int(std::clamp<int64_t>(entries - t - keys_ahead, 0, n)), products);
            for (int h = 0; h < count; ++h) {
                // Past the end the last entry counts again: its score is left out below.
                for (int i = n; i < width; ++i) products[h][i] = products[h][n - 1];
                Vec score = (reduce_add_each(products[h]) + Vec(queries[h].offset)) *
                            Vec(scale * queries[h].scale);
                if (scaled) {
                    float scales[width];
                    const float* from = k.scales + t * k.scale_stride + first + h;
                    for (int i = 0; i < n; ++i) scales[i] = from[i * k.scale_stride];
                    for (int i = n; i < width; ++i) scales[i] = scales[n - 1];
                    score = score * Vec::load(scales);
                }
                score.store(scratch + h * row + t, n);
                largest[h] = max(largest[h], score);
            }
        }
        for (int h = 0; h < count; ++h) {
            float* weights = scratch + h * row;
            const Vec most(reduce_max(largest[h]));
            Vec added(0.0f);
            int64_t t = 0;
            for (; t + width <= entries; t += width) {
                const Vec weight = exp(Vec::load(weights + t) - most);
                weight.store(weights + t);
                added = added + weight;
            }
            float total = reduce_add(added);
            if (const int n = int(entries - t)) {
                exp(Vec::load(weights + t, n) - most).store(weights + t, n);
                for (int i = 0; i < n; ++i) total += weights[t + i];
            }
            if (sums != nullptr) sums[first + h] = {reduce_max(largest[h]), total};
            const float inverse = sums != nullptr ? 1.0f : 1.0f / total;
            for (t = 0; t < entries; ++t) {
                weights[t] *= scaled ? inverse * v.scales[t * v.scale_stride + first + h] : inverse;
            }
        }
        float* values = out + first * head_dim;
        std::memset(values, 0, size_t(count) * size_t(head_dim) * sizeof(float));
        for (int64_t t = 0; t < entries; t += entries_at_once) {
            const int n = int(std::min<int64_t>(entries_at_once, entries - t));
            const int asked = int(std::clamp<int64_t>(entries - t - values_ahead, 0, n));
            for (int h = 0; h < count; ++h) {
                add_head(v.data + t * v.stride + (first + h) * head_dim, v.stride, n,
                         scratch + h * row + t, values_ahead * v.stride, asked, head_dim,
                         values + h * head_dim);
            }
        }
        for (int h = 0; h < count; ++h) order_head<T>(head_dim, values + h * head_dim);
    }
}

// out = the attention of one head to all entries, from that to `count` parts of them (at most
// max_threads). Part i's weighted values are at values + i * stride and its sums at
// sums[i * sums_stride]; a part without entries has a total of 0.
inline void add_parts(const float* values, int64_t stride, const PartSum* sums, int64_t sums_stride,
                      int64_t count, int head_dim, float* out) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
    float factors[max_threads] = {};
    for (int64_t i = 0; i < count; ++i) {
        const PartSum& part = sums[i * sums_stride];
        if (part.total != 0.0f) largest = std::max(largest, part.largest);
    }
    for (int64_t i = 0; i < count; ++i) {
        const PartSum& part = sums[i * sums_stride];
        if (part.total != 0.0f) factors[i] = std::exp(part.largest - largest);
        total += factors[i] * part.total;
    }
    std::memset(out, 0, size_t(head_dim) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
        const float factor = factors[i] / total;
        if (factors[i] == 0.0f) continue;
        for (int d = 0; d < head_dim; ++d) out[d] += factor * values[i * stride + d];
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
