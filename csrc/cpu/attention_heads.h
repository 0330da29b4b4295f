// Attention of single queries to a cache: what each decoding step does for every sequence.
//
// Traffic: the keys and values in use, once each. Per key a product a vector and about three
// operations of the sums of 16 keys at a time; per value a multiply-add a vector, after widening
// where it is not float32.
//
// Entries are cut into parts of 128 by their places alone; each part has a softmax and sums of its
// own, and the parts are added up in their order (Dao et al., 2023). So a result has the same bits
// whichever threads compute the parts, and whatever else is computed beside it. A part's sums are
// head_dim + 2 floats a head, beside its 256 head_dim elements of keys and values.
//
// Within a part entry by entry, the keys of up to 16 heads before the next, values 8 entries at a
// time: head by head, each a strided walk through the cache, 32 rows of 129 bfloat16 entries were
// read at 16 GB/s beside 29 that the memory gives (2 cores of an EPYC, Zen 4).
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
// int8 entries have factors, that of entry t of head h at scales[t * scale_stride + h]. Where there
// are pages, entry t lies so in page pages[t / page_size], at t % page_size: runs of 16 entries
// from a multiple of 16 on lie in one page.
template <typename T>
struct CachedHeads {
    const T* data;
    int64_t stride;
    const float* scales;
    int64_t scale_stride;
    const int64_t* pages = nullptr;  // null: one page holds all
    int64_t page_size = 0, page_stride = 0, scale_page_stride = 0;

    // Entry t, and its factors.
    const T* at(int64_t t) const {
        if (pages == nullptr) return data + t * stride;
        return data + page(t) * page_stride + place(t) * stride;
    }
    const float* scales_at(int64_t t) const {
        if (pages == nullptr) return scales + t * scale_stride;
        return scales + page(t) * scale_page_stride + place(t) * scale_stride;
    }
    // Divided as 32 bits: several times as fast on older processors.
    int64_t page(int64_t t) const { return pages[uint32_t(t) / uint32_t(page_size)]; }
    int64_t place(int64_t t) const { return uint32_t(t) % uint32_t(page_size); }
    // The same from a later head on.
    CachedHeads from_head(int head, int head_dim) const {
        CachedHeads later = *this;
        later.data += head * head_dim;
        if (scales != nullptr) later.scales += head;
        return later;
    }
};

// Entries of which a part has so many, but the last one.
constexpr int part_entries = 128;
// Entries that lie at one stride from each other.
constexpr int run_entries = 16;
static_assert(part_entries % run_entries == 0 && run_entries % Vec::width == 0);

inline int64_t parts_of(int64_t entries) { return (entries + part_entries - 1) / part_entries; }

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

// How many entries ahead to prefetch, so that they are 8 KB away: whole runs.
inline int64_t entries_ahead(int64_t entry_bytes) {
    const int64_t run = run_entries * std::max<int64_t>(1, entry_bytes);
    return run_entries * ((8192 + run - 1) / run);
}

// Into the second-level cache: in the first, prefetched lines would evict the entries that are in
// use. Always inlined: GCC takes a call that does nothing but prefetch for one that does nothing.
[[gnu::always_inline]] inline void prefetch_range(const void* begin, int64_t bytes) {
    const auto* next = static_cast<const uint8_t*>(begin);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
}

// Some entries that follow each other, to be prefetched beside others.
template <typename T>
struct Upcoming {
    const T* data = nullptr;
    int64_t stride = 0;
    int count = 0;

    // Up to `count` entries from t on, if they are before `end`: behind that lie pages of memory
    // that nothing has touched yet, and a prefetch from those walks the page tables for nothing.
    static Upcoming of(const CachedHeads<T>& x, int64_t t, int64_t end, int count) {
        if (t >= end) return {};
        return {x.at(t), x.stride, int(std::min<int64_t>(count, end - t))};
    }

    // Prefetches `size` elements from `offset` on of the i-th one.
    [[gnu::always_inline]] void ask(int i, int64_t offset, int size) const {
        if (i < count) prefetch_range(data + i * stride + offset, size * int64_t(sizeof(T)));
    }
};

// sums += weights[t] * entry t over some entries, for `vectors` x width elements. bfloat16 entries
// are read as words, so that the sums of two vectors hold the even and the odd elements. Beside
// each entry the same elements of an upcoming one are prefetched.
template <typename T, int vectors>
inline void add_entries(const T* data, int64_t stride, int count, const float* weights,
                        Upcoming<T> ahead, int64_t offset, float* sums) {
    Vec sum[vectors];
    for (int c = 0; c < vectors; ++c) sum[c] = Vec::load(sums + c * Vec::width);
    for (int t = 0; t < count; ++t) {
        const T* value = data + t * stride;
        ahead.ask(t, offset, vectors * Vec::width);
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

// The same for a whole head, whose elements begin at `offset`.
template <typename T>
inline void add_head(const T* data, int64_t stride, int count, const float* weights,
                     Upcoming<T> ahead, int64_t offset, int head_dim, float* sums) {
    data += offset;
    int d = 0;
    for (; d + value_vectors * Vec::width <= head_dim; d += value_vectors * Vec::width) {
        add_entries<T, value_vectors>(data + d, stride, count, weights, ahead, offset + d,
                                      sums + d);
    }
    for (; d + Vec::width <= head_dim; d += Vec::width) {
        add_entries<T, 1>(data + d, stride, count, weights, ahead, offset + d, sums + d);
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

// products[h][i] = those of the query of head h with entry i of `count`, whose keys begin at
// `keys`; beside each entry an upcoming one is prefetched.
template <typename T, int vectors>
void multiply_entries(const Query<T>* queries, int heads, const T* keys, int64_t stride, int count,
                      Upcoming<T> ahead, Vec (*products)[Vec::width]) {
    const int dim = vectors > 0 ? vectors * Query<T>::vector_inputs : queries->head_dim;
    for (int i = 0; i < count; ++i, keys += stride) {
        for (int h = 0; h < heads; ++h) {
            ahead.ask(i, h * dim, dim);
            products[h][i] = queries[h].template times<vectors>(keys + h * dim);
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

// The sums of a part, or of several, for any number of heads.
struct PartSums {
    float* values;   // (heads, head_dim), weighted by e^(score - largest)
    float* largest;  // (heads), scores
    float* total;    // (heads), of the weights

    PartSums from_head(int head, int head_dim) const {
        return {values + head * head_dim, largest + head, total + head};
    }
};

// Adds a part to those before it.
inline void add_part(const PartSums& part, int heads, int head_dim, const PartSums& to) {
    constexpr int width = Vec::width;
    for (int first = 0; first < heads; first += width) {
        const int n = std::min(width, heads - first);
        const Vec before = Vec::load(to.largest + first, n);
        const Vec here = Vec::load(part.largest + first, n);
        const Vec most = max(before, here);
        const Vec kept = exp(before - most), added = exp(here - most);
        most.store(to.largest + first, n);
        fma(Vec::load(part.total + first, n), added, Vec::load(to.total + first, n) * kept)
            .store(to.total + first, n);
        float old_factors[width], new_factors[width];
        kept.store(old_factors);
        added.store(new_factors);
        for (int h = 0; h < n; ++h) {
            const Vec old_factor(old_factors[h]), new_factor(new_factors[h]);
            const float* from = part.values + (first + h) * head_dim;
            float* out = to.values + (first + h) * head_dim;
            int d = 0;
            for (; d + width <= head_dim; d += width) {
                fma(Vec::load(from + d), new_factor, Vec::load(out + d) * old_factor)
                    .store(out + d);
            }
            if (const int rest = head_dim - d) {
                fma(Vec::load(from + d, rest), new_factor, Vec::load(out + d, rest) * old_factor)
                    .store(out + d, rest);
            }
        }
    }
}

// Makes the attention to all entries of the sums of their parts.
inline void divide_by_total(const PartSums& sums, int heads, int head_dim) {
    for (int h = 0; h < heads; ++h) {
        const float inverse = 1.0f / sums.total[h];
        for (int d = 0; d < head_dim; ++d) sums.values[h * head_dim + d] *= inverse;
    }
}

// factors[h] = those of head h's entries from t on, of which there are `count`, the last one's
// going on to the end of the vector.
template <typename T>
inline void load_factors(const CachedHeads<T>& x, int64_t t, int count, int heads, Vec* factors) {
    const float* from = x.scales_at(t);
    for (int first = 0; first < heads; first += Vec::width) {
        const int n = std::min(Vec::width, heads - first);
        Vec rows[Vec::width];
        for (int i = 0; i < Vec::width; ++i) {
            rows[i] = Vec::load(from + std::min(i, count - 1) * x.scale_stride + first, n);
        }
        transpose(rows);
        for (int h = 0; h < n; ++h) factors[first + h] = rows[h];
    }
}

// Prefetches what load_factors will load of up to `count` entries from t on that are before `end`.
template <typename T>
[[gnu::always_inline]] inline void ask_for_factors(const CachedHeads<T>& x, int64_t t, int64_t end,
                                                   int count) {
    if (t >= end) return;
    const float* from = x.scales_at(t);
    const int n = int(std::min<int64_t>(count, end - t));
    for (int i = 0; i < n; ++i) __builtin_prefetch(from + i * x.scale_stride, 0, 3);
}

// Of up to 16 heads the weights e^(score - largest) of a part's entries, in place of the scores, of
// which a head's lie `row` behind those of the head before.
inline void weigh_part(float* scores, int64_t row, int heads, int entries, const PartSums& sums) {
    constexpr int width = Vec::width;
    for (int h = 0; h < heads; ++h, scores += row) {
        Vec most(-std::numeric_limits<float>::infinity()), added(0.0f);
        for (int t = 0; t < entries; t += width) most = max(most, Vec::load(scores + t));
        const float largest = reduce_max(most);
        int t = 0;
        for (; t + width <= entries; t += width) {
            const Vec weight = exp(Vec::load(scores + t) - Vec(largest));
            weight.store(scores + t);
            added = added + weight;
        }
        float total = reduce_add(added);
        if (const int n = entries - t) {
            exp(Vec::load(scores + t, n) - Vec(largest)).store(scores + t, n);
            for (int i = 0; i < n; ++i) total += scores[t + i];
        }
        sums.largest[h] = largest;
        sums.total[h] = total;
    }
}

// Floats of scratch that attend_heads needs.
inline int64_t attend_heads_scratch(int64_t heads, int64_t head_dim, int64_t entries) {
    return std::min<int64_t>(heads, heads_at_once) * (entries + Vec::width + head_dim);
}

// Attention of one query of each of some heads, which lie side by side in q as in the cache, to the
// entries [begin, end), which begin with a part: the sums of their parts. The heads take turns with
// every few entries, so that memory is read in the order in which it lies. Without `reads_ahead`
// nothing is prefetched.
template <typename T>
void attend_heads(const float* q, int heads, int64_t begin, int64_t end, const CachedHeads<T>& k,
                  const CachedHeads<T>& v, int head_dim, float scale, bool reads_ahead,
                  float* scratch, const PartSums& out) {
    constexpr bool scaled = std::is_same_v<T, int8_t>;
    constexpr int width = Vec::width;
    const int64_t row = end - begin + width;  // floats of a head's weights
    const auto multiply = multiply_entries_for<T>(head_dim);
    for (int first = 0; first < heads; first += heads_at_once) {
        const int count = std::min(heads_at_once, heads - first);
        const CachedHeads<T> keys = k.from_head(first, head_dim);
        const CachedHeads<T> values = v.from_head(first, head_dim);
        const int64_t keys_ahead = entries_ahead(keys.stride * int64_t(sizeof(T)));
        const int64_t values_ahead = entries_ahead(values.stride * int64_t(sizeof(T)));
        const int64_t asked = reads_ahead ? end : begin;  // the end of what is prefetched
        Query<T> queries[heads_at_once];
        for (int h = 0; h < count; ++h) {
            queries[h].prepare(q + (first + h) * head_dim, head_dim);
        }
        for (int64_t t = begin; t < end; t += width) {
            const int n = int(std::min<int64_t>(width, end - t));
            const auto ahead = Upcoming<T>::of(keys, t + keys_ahead, asked, width);
            if constexpr (scaled) ask_for_factors(keys, t + keys_ahead, asked, width);
            Vec products[heads_at_once][width], factors[heads_at_once];
            multiply(queries, count, keys.at(t), keys.stride, n, ahead, products);
            if constexpr (scaled) load_factors(keys, t, n, count, factors);
            for (int h = 0; h < count; ++h) {
                // Past the end the last entry counts again: it changes no maximum, and no weight
                // there is added.
                for (int i = n; i < width; ++i) products[h][i] = products[h][n - 1];
                Vec score = (reduce_add_each(products[h]) + Vec(queries[h].offset)) *
                            Vec(scale * queries[h].scale);
                if constexpr (scaled) score = score * factors[h];
                score.store(scratch + h * row + t - begin);
            }
        }
        float largest[heads_at_once], total[heads_at_once];
        const PartSums sums = out.from_head(first, head_dim);
        const PartSums later = {scratch + count * row, largest, total};
        for (int64_t from = begin; from < end; from += part_entries) {
            const PartSums& part = from == begin ? sums : later;
            const int entries = int(std::min<int64_t>(part_entries, end - from));
            float* weights = scratch + from - begin;
            weigh_part(weights, row, count, entries, part);
            std::memset(part.values, 0, size_t(count) * size_t(head_dim) * sizeof(float));
            if constexpr (scaled) {
                for (int t = 0; t < entries; t += width) {
                    Vec factors[heads_at_once];
                    ask_for_factors(values, from + t + values_ahead, asked, width);
                    load_factors(values, from + t, std::min(width, entries - t), count, factors);
                    for (int h = 0; h < count; ++h) {
                        float* at = weights + h * row + t;
                        (Vec::load(at) * factors[h]).store(at);
                    }
                }
            }
            for (int t = 0; t < entries; t += entries_at_once) {
                const int n = std::min(entries_at_once, entries - t);
                const auto ahead =
                    Upcoming<T>::of(values, from + t + values_ahead, asked, entries_at_once);
                const T* at = values.at(from + t);
                for (int h = 0; h < count; ++h) {
                    add_head(at, values.stride, n, weights + h * row + t, ahead, h * head_dim,
                             head_dim, part.values + h * head_dim);
                }
            }
            for (int h = 0; h < count; ++h) order_head<T>(head_dim, part.values + h * head_dim);
            if (from > begin) add_part(later, count, head_dim, sums);
        }
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
