// Causal attention without a T x T matrix (Dao et al., 2022; Milakov & Gimelshein, 2018).
//
// A block of 32 queries lies across the vectors: their scores with a key are one row of a panel,
// maxima and sums over keys are elementwise, and the weights come out as the panel that the
// product with the values wants. Keys and values are read where they lie, a word at a time for all
// queries, so that nothing is transposed but the queries and the result.
//
// For T queries and keys of head size D: 2 T^2 D multiply-adds a head with the masked half skipped
// but for the diagonal's blocks, T^2 / 2 exponentials.
#pragma once

#include "gemm.h"

namespace gpt2fast::GPT2FAST_ISA {

template <typename T>
constexpr Format format_of = std::is_same_v<T, float> ? Format::float32 : Format::bfloat16;

// Keys whose scores are held at once.
constexpr int key_block = 56;

// Floats of scratch that attend_block needs.
inline int64_t attention_scratch(int64_t head_dim) {
    const int64_t panel = head_dim * panel_columns;  // queries, and as much for the sums
    return 2 * panel + key_block * panel_columns + key_block * head_dim;
}

// One head's keys or values: entry t begins at data + t * stride.
template <typename T>
struct Entries {
    const T* data;
    int64_t stride;
};

// Words of the queries' panel: [input / u][32][u], queries past the last being zero.
template <typename T, typename Q>
void pack_queries(const Q* q, int64_t stride, int queries, int head_dim, uint32_t* panel) {
    constexpr int u = inputs_per_word(format_of<T>);
    for (int k = 0; k < head_dim / u; ++k) {
        for (int i = 0; i < panel_columns; ++i) {
            T values[u] = {};
            for (int j = 0; j < u; ++j) {
                if (i < queries) gpt2fast::assign(values[j], to_float(q[i * stride + k * u + j]));
            }
            std::memcpy(panel + k * panel_columns + i, values, 4);
        }
    }
}

// Attention of `queries` <= 32 consecutive queries of one head; query i sees entries 0 ..
// first + i. `out` receives a row of head_dim for each, `lse` (may be null) the logarithm of the
// sum of the exponentials of its scores.
template <typename T, typename Q, typename O>
void attend_block(const Q* q, int64_t q_stride, int queries, int64_t first, Entries<T> k,
                  Entries<T> v, int head_dim, float scale, float* scratch, O* out,
                  int64_t out_stride, float* lse) {
    constexpr Format format = format_of<T>;
    constexpr int u = inputs_per_word(format);
    constexpr int vectors = panel_vectors;
    uint32_t* panel = reinterpret_cast<uint32_t*>(scratch);
    float* sums = scratch + head_dim * panel_columns;
    float* scores = sums + head_dim * panel_columns;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scores + key_block * panel_columns);
    pack_queries<T>(q, q_stride, queries, head_dim, panel);
    std::memset(sums, 0, size_t(head_dim) * panel_columns * sizeof(float));

    Vec largest[vectors], total[vectors], lane[vectors];
    for (int c = 0; c < vectors; ++c) {
        float index[Vec::width];
        for (int i = 0; i < Vec::width; ++i) index[i] = float(c * Vec::width + i);
        lane[c] = Vec::load(index);
        largest[c] = Vec(-std::numeric_limits<float>::infinity());
        total[c] = Vec(0.0f);
    }
    const Vec hidden(-std::numeric_limits<float>::infinity());
    const int64_t entries = first + queries;
    for (int64_t begin = 0; begin < entries; begin += key_block) {
        const int keys = int(std::min<int64_t>(key_block, entries - begin));
        const Tiles key_tiles(format, keys);
        for (int64_t tile = 0; tile < key_tiles.count; ++tile) {
            const int64_t key = key_tiles.begin(tile);
            multiply_floats_for<format>(key_tiles.size(tile))(
                reinterpret_cast<const uint8_t*>(panel),
                {reinterpret_cast<const uint8_t*>(k.data + (begin + key) * k.stride),
                 k.stride * int64_t(sizeof(T)), 4},
                head_dim / u, scores + key * panel_columns, false);
        }
        Vec before[vectors];
        for (int c = 0; c < vectors; ++c) {
            before[c] = largest[c];
            for (int j = 0; j < keys; ++j) {
                float* row = scores + j * panel_columns + c * Vec::width;
                Vec score = Vec::load(row) * Vec(scale);
                if (begin + j > first) {
                    score = select(lane[c] < Vec(float(begin + j - first)), hidden, score);
                }
                score.store(row);
                largest[c] = max(largest[c], score);
            }
            Vec sum(0.0f);
            for (int j = 0; j < keys; ++j) {
                float* row = scores + j * panel_columns + c * Vec::width;
                const Vec weight = exp(Vec::load(row) - largest[c]);
                weight.store(row);
                sum = sum + weight;
            }
            const Vec kept = exp(before[c] - largest[c]);
            total[c] = fma(total[c], kept, sum);
            if (begin > 0) {
                for (int d = 0; d < head_dim; ++d) {
                    float* row = sums + d * panel_columns + c * Vec::width;
                    (Vec::load(row) * kept).store(row);
                }
            }
        }

        Strided values = {reinterpret_cast<const uint8_t*>(v.data + begin * v.stride), 4,
                          v.stride * int64_t(sizeof(T))};
        int words = keys;
        if constexpr (format == Format::bfloat16) {
            // Pairs of neighbouring keys share a word, in the weights as in the values.
            words = (keys + 1) / 2;
            for (int j = 0; j < words; ++j) {
                const T* even = v.data + (begin + 2 * j) * v.stride;
                const bool single = 2 * j + 1 == keys;
                const T* odd = even + (single ? 0 : v.stride);
                for (int d = 0; d < head_dim; ++d) {
                    pairs[j * head_dim + d] =
                        even[d].bits | (single ? 0u : uint32_t(odd[d].bits) << 16);
                }
                bfloat16 low[panel_columns], high[panel_columns] = {};
                for (int c = 0; c < vectors; ++c) {
                    const float* row = scores + 2 * j * panel_columns + c * Vec::width;
                    Vec::load(row).store(low + c * Vec::width);
                    if (!single) Vec::load(row + panel_columns).store(high + c * Vec::width);
                }
                // Row j of pairs lies before row 2j of weights, which was read just now.
                uint32_t* packed = reinterpret_cast<uint32_t*>(scores) + j * panel_columns;
                for (int i = 0; i < panel_columns; ++i) {
                    packed[i] = low[i].bits | uint32_t(high[i].bits) << 16;
                }
            }
            values = {reinterpret_cast<const uint8_t*>(pairs), 4, 4 * int64_t(head_dim)};
        }
        const Tiles dim_tiles(format, head_dim);
        for (int64_t tile = 0; tile < dim_tiles.count; ++tile) {
            const int64_t d = dim_tiles.begin(tile);
            multiply_floats_for<format>(dim_tiles.size(tile))(
                reinterpret_cast<const uint8_t*>(scores),
                {values.data + 4 * d, values.row_stride, values.word_stride}, words,
                sums + d * panel_columns, true);
        }
    }

    alignas(64) float inverse[panel_columns];
    for (int c = 0; c < vectors; ++c) (Vec(1.0f) / total[c]).store(inverse + c * Vec::width);
    for (int i = 0; i < queries; ++i) {
        for (int d = 0; d < head_dim; ++d) {
            gpt2fast::assign(out[i * out_stride + d], sums[d * panel_columns + i] * inverse[i]);
        }
    }
    if (lse != nullptr) {
        alignas(64) float maxima[panel_columns];
        for (int c = 0; c < vectors; ++c) largest[c].store(maxima + c * Vec::width);
        for (int i = 0; i < queries; ++i) lse[i] = maxima[i] - std::log(inverse[i]);
    }
}

// Attention of one query to the first `entries` entries: memory is read once, keys then values.
// `weights` is scratch for that many floats. int8 entries have a scale each, `scale_stride` apart.
template <typename T>
void attend_one(const float* q, int64_t entries, Entries<T> k, const float* k_scales, Entries<T> v,
                const float* v_scales, int64_t scale_stride, int head_dim, float scale,
                float* weights, float* out) {
    constexpr bool scaled = std::is_same_v<T, int8_t>;
    constexpr int ahead = 8;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < entries; ++t) {
        const T* key = k.data + t * k.stride;
        for (int64_t byte = 0; byte < head_dim * int64_t(sizeof(T)); byte += 64) {
            prefetch(reinterpret_cast<const uint8_t*>(key + ahead * k.stride) + byte);
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
        float score = reduce_add(even + odd) * scale;
        if (scaled) score *= k_scales[t * scale_stride];
        weights[t] = score;
        largest = std::max(largest, score);
    }
    Vec sums(0.0f);
    int64_t t = 0;
    for (; t + Vec::width <= entries; t += Vec::width) {
        const Vec weight = exp(Vec::load(weights + t) - Vec(largest));
        weight.store(weights + t);
        sums = sums + weight;
    }
    float total = reduce_add(sums);
    if (const int n = int(entries - t)) {
        const Vec weight = exp(Vec::load(weights + t, n) - Vec(largest));
        weight.store(weights + t, n);
        for (int i = 0; i < n; ++i) total += weights[t + i];
    }
    const float inverse = 1.0f / total;
    constexpr int most = 4;  // vectors of the result that are summed in one pass
    for (int begin = 0; begin < head_dim; begin += most * Vec::width) {
        const int size = std::min(most * Vec::width, head_dim - begin);
        Vec sum[most];
        for (int c = 0; c < most; ++c) sum[c] = Vec(0.0f);
        for (t = 0; t < entries; ++t) {
            const T* value = v.data + t * v.stride + begin;
            prefetch(reinterpret_cast<const uint8_t*>(value + ahead * v.stride));
            prefetch(reinterpret_cast<const uint8_t*>(value + ahead * v.stride + size - 1));
            const Vec weight(scaled ? weights[t] * v_scales[t * scale_stride] : weights[t]);
            if (size == most * Vec::width) {
                for (int c = 0; c < most; ++c) {
                    sum[c] = fma(weight, Vec::load(value + c * Vec::width), sum[c]);
                }
            } else {
                for (int c = 0; c * Vec::width < size; ++c) {
                    const int n = std::min(Vec::width, size - c * Vec::width);
                    sum[c] = fma(weight, Vec::load(value + c * Vec::width, n), sum[c]);
                }
            }
        }
        for (int c = 0; c * Vec::width < size; ++c) {
            const int n = std::min(Vec::width, size - c * Vec::width);
            (sum[c] * Vec(inverse)).store(out + begin + c * Vec::width, n);
        }
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
