// The backward pass of attention, without a T x T matrix (Dao et al., 2022).
//
// The weights of a block of 32 queries are computed again from their log-normalizers. Queries lie
// across the vectors as in the forward pass, for P, dP and dQ; for dK and dV, sums over queries,
// the rows of queries and gradients are the panels, and they are multiplied with the rows
// of P and dS. So nothing but the queries' block is transposed, and dK and dV of a key head are
// summed in one pass by one thread over all query heads that share it, in their order: 5 T^2 D
// multiply-adds a query head with the masked half skipped, T^2 / 2 exponentials; twice as many
// where it is not causal. Memory sees q, k, v, out and the gradients once.
#pragma once

#include "attention.h"

namespace gpt2fast::GPT2FAST_ISA {

// Rows [0, rows) of x, zeros up to the 32nd, as panels of 32 columns: [panel][row / u][32][u].
template <Format format, typename T>
void pack_panels(Entries<T> x, int rows, int size, uint32_t* panels) {
    constexpr int u = inputs_per_word(format);
    constexpr int n = panel_columns;
    const int columns = (size + n - 1) / n * n;
    std::memset(panels, 0, size_t(columns) * (n / u) * 4);
    for (int begin = 0; begin < size; begin += n) {
        for (int i = 0; i < rows; i += u) {
            pack_pairs<format>(x.data + i * x.stride + begin, x.stride, rows - i,
                               std::min(n, size - begin), panels + i / u * n);
        }
        panels += n / u * n;
    }
}

// sums (panels, time, 32) += the products of `rows` rows of 32 queries with each of the panels.
template <Format format>
void add_products(const uint32_t* panels, int count, Strided rows, int keys, float* sums,
                  int64_t time) {
    constexpr int words = panel_columns / inputs_per_word(format);
    for (int p = 0; p < count; ++p) {
        multiply_rows<format>(reinterpret_cast<const uint8_t*>(panels + p * words * panel_columns),
                              rows, 0, keys, words, sums + p * time * panel_columns, true);
    }
}

template <typename T>
void attention_backward_heads(const AttentionBackward& args, int64_t begin, int64_t end) {
    constexpr Format format = format_of<Factor<T>>;
    constexpr int u = inputs_per_word(format);
    constexpr int n = panel_columns, vectors = panel_vectors;
    const Attention& forward = args.forward;
    const int64_t time = forward.time, heads = forward.heads, key_heads = forward.key_heads;
    const int size = int(forward.head_dim);
    const int words = (size + u - 1) / u;
    const int panels = (size + n - 1) / n;
    const int64_t blocks = (time + n - 1) / n;
    const int64_t along = time * words, across = (time + u - 1) / u * size;
    const int64_t sums = panels * time * n, block = panels * n * n, tile = key_block * n;
    Scratch scratch(2 * Scratch::size(along) + Scratch::size(across) + 2 * sums + 5 * block +
                    5 * tile);
    const auto words_of = [&](int64_t count) {
        return reinterpret_cast<uint32_t*>(scratch.take(count));
    };
    uint32_t *k_along = words_of(along), *v_along = words_of(along), *k_across = words_of(across);
    float *grad_k = scratch.take(sums), *grad_v = scratch.take(sums);
    uint32_t *q_across = words_of(block), *q_panels = words_of(block);
    uint32_t *grad_across = words_of(block), *grad_panels = words_of(block);
    float* grad_q = scratch.take(block);
    float *weights = scratch.take(tile), *slopes = scratch.take(tile);
    float* factors = scratch.take(tile);
    // The rows of weights and slopes as words, where they are not floats.
    uint32_t *weight_rows = words_of(tile), *slope_rows = words_of(tile);
    const Lanes lanes;

    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / key_heads, key_head = item % key_heads;
        const Entries<T> k = head_of<T>(forward.k, row, key_head);
        const Entries<T> v = head_of<T>(forward.v, row, key_head);
        pack_entries<format>(k, 0, time, size, k_along, k_across);
        pack_entries<format>(v, 0, time, size, v_along, nullptr);
        std::memset(grad_k, 0, size_t(sums) * sizeof(float));
        std::memset(grad_v, 0, size_t(sums) * sizeof(float));

        for (int64_t part = 0; part < forward.group() * blocks; ++part) {
            const int64_t head = key_head * forward.group() + part / blocks;
            const int64_t first = part % blocks * n;
            const Entries<T> q = head_of<T>(forward.q, row, head);
            const Entries<T> grad = head_of<T>(args.grad, row, head);
            const Entries<T> out = head_of<T>(args.out, row, head);
            const Weighting weighting = weighting_of(forward, row, head);
            const int queries = int(std::min<int64_t>(n, time - first));
            const Entries<T> q_block{q.data + first * q.stride, q.stride};
            const Entries<T> grad_block{grad.data + first * grad.stride, grad.stride};
            pack_queries<Factor<T>>(q_block.data, q.stride, queries, size, q_across);
            pack_queries<Factor<T>>(grad_block.data, grad.stride, queries, size, grad_across);
            pack_panels<format>(q_block, queries, size, q_panels);
            pack_panels<format>(grad_block, queries, size, grad_panels);
            std::memset(grad_q, 0, size_t(size) * n * sizeof(float));
            alignas(64) float inner[n] = {}, normalizer[n];
            for (int i = 0; i < n; ++i) {
                normalizer[i] = std::numeric_limits<float>::infinity();
                if (i >= queries) continue;
                normalizer[i] = forward.lse[(row * heads + head) * time + first + i];
                Sum sum;
                for_columns(size, [&](int64_t d, auto step, auto chain) {
                    sum.v[chain] =
                        fma(load(grad_block.data + i * grad.stride + d, step),
                            load(out.data + (first + i) * out.stride + d, step), sum.v[chain]);
                });
                inner[i] = sum.total();
            }

            const int64_t entries = entries_of(forward, first, queries);
            for (int64_t key = 0; key < entries; key += key_block) {
                const int keys = int(std::min<int64_t>(key_block, entries - key));
                const auto along_of = [&](const uint32_t* rows) {
                    return Strided{reinterpret_cast<const uint8_t*>(rows + key * words), 4 * words,
                                   4};
                };
                multiply_rows<format>(reinterpret_cast<const uint8_t*>(q_across), along_of(k_along),
                                      0, keys, words, weights, false);
                multiply_rows<format>(reinterpret_cast<const uint8_t*>(grad_across),
                                      along_of(v_along), 0, keys, words, slopes, false);
                const bool drops = weighting.dropout > 0.0f;
                for (int j = 0; drops && j < keys; j += 4) {
                    dropout_factors(weighting, first, key + j, factors + j * n);
                }
                for (int c = 0; c < vectors; ++c) {
                    const Vec lse = Vec::load(normalizer + c * Vec::width);
                    const Vec center = Vec::load(inner + c * Vec::width);
                    for (int j = 0; j < keys; ++j) {
                        const int64_t at = j * n + c * Vec::width;
                        const Vec product = Vec::load(weights + at) * Vec(forward.scale);
                        const Vec score =
                            visible_scores(product, lanes, c, first, key + j, weighting);
                        const Vec weight = exp(score - lse);
                        Vec slope = Vec::load(slopes + at), dropped = weight;
                        if (drops) {
                            const Vec factor = Vec::load(factors + at);
                            slope = slope * factor;
                            dropped = weight * factor;
                        }
                        slope = weight * (slope - center) * Vec(forward.scale);
                        dropped.store(weights + at);
                        slope.store(slopes + at);
                        if constexpr (format == Format::bfloat16) {
                            dropped.store(reinterpret_cast<bfloat16*>(weight_rows) + at);
                            slope.store(reinterpret_cast<bfloat16*>(slope_rows) + at);
                        }
                    }
                }

                constexpr bool narrow = format == Format::bfloat16;
                const void* weight_data = narrow ? static_cast<void*>(weight_rows) : weights;
                const void* slope_data = narrow ? static_cast<void*>(slope_rows) : slopes;
                add_products<format>(grad_panels, panels,
                                     {static_cast<const uint8_t*>(weight_data), 4 * n / u, 4}, keys,
                                     grad_v + key * n, time);
                add_products<format>(q_panels, panels,
                                     {static_cast<const uint8_t*>(slope_data), 4 * n / u, 4}, keys,
                                     grad_k + key * n, time);
                pack_weights<format>(slopes, keys);
                multiply_rows<format>(
                    reinterpret_cast<const uint8_t*>(slopes),
                    {reinterpret_cast<const uint8_t*>(k_across + key / u * size), 4, 4 * size}, 0,
                    size, (keys + u - 1) / u, grad_q, true);
            }
            T* to = static_cast<T*>(args.grad_q) + ((row * time + first) * heads + head) * size;
            alignas(64) float ones[n];
            for (float& one : ones) one = 1.0f;
            write_queries(grad_q, ones, queries, size, to, heads * size);
        }

        const auto write = [&](const float* from, void* gradients) {
            T* to = static_cast<T*>(gradients) + (row * time * key_heads + key_head) * size;
            for (int64_t t = 0; t < time; ++t, to += key_heads * size) {
                for (int p = 0; p < panels; ++p) {
                    const float* panel = from + (p * time + t) * n;
                    for_columns(std::min(n, size - p * n), [&](int64_t d, auto step, auto) {
                        store(load(panel + d, step), to + p * n + d, step);
                    });
                }
            }
        };
        write(grad_k, args.grad_k);
        write(grad_v, args.grad_v);
    }
}

inline void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end) {
    with_type(args.forward.dtype, [&](auto* type) {
        attention_backward_heads<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
