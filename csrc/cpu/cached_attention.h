// Attention of the newest queries of ragged rows to a key-value cache.
//
// A single query reads the row's keys and values once, in their own type: 2 s D elements a head
// for s entries. Queries of a prompt go in blocks of 32. Where queries are float32 and the cache is
// bfloat16, a block's entries are widened first, so that no query loses bits.
#pragma once

#include "attention.h"
#include "scratch.h"

namespace gpt2fast::GPT2FAST_ISA {

template <typename T, typename Q>
void attend_to_cache(const CachedAttention& args, int64_t begin, int64_t end) {
    const int dim = int(args.head_dim);
    const int64_t blocks = (args.time + attention_queries - 1) / attention_queries;
    // Words of two bfloat16 need an even head size.
    const bool narrow = std::is_same_v<T, bfloat16> && std::is_same_v<Q, bfloat16> && dim % 2 == 0;
    const bool widens = std::is_same_v<T, bfloat16> && !narrow && args.time > 1;
    const int64_t widened = widens ? args.entries * dim : 0;
    Scratch scratch(Scratch::size(attention_scratch(dim)) +
                    Scratch::size(attend_heads_scratch(1, dim, args.entries)) +
                    2 * Scratch::size(dim) + 2 * Scratch::size(widened));
    float* block_scratch = scratch.take(attention_scratch(dim));
    float* single_scratch = scratch.take(attend_heads_scratch(1, dim, args.entries));
    float* query = scratch.take(dim);
    float* result = scratch.take(dim);
    float* wide_k = scratch.take(widened);
    float* wide_v = scratch.take(widened);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item % args.heads;
        const int64_t block = item / args.heads % blocks, row = item / args.heads / blocks;
        const int64_t start = block * attention_queries;
        const int64_t first = args.lengths[row] + start;
        const int queries = int(std::min(attention_queries, args.time - start));
        // Padding may lie past the end of the cache.
        const int inside = int(std::min<int64_t>(queries, args.entries - first));
        const Q* q = args.q.as<const Q>().at(row, start, head);
        Q* out = static_cast<Q*>(args.out) +
                 ((row * args.time + start) * args.heads + head) * args.head_dim;
        const int64_t out_stride = args.heads * args.head_dim;
        for (int i = std::max(inside, 0); i < queries; ++i) {
            for (int d = 0; d < dim; ++d) gpt2fast::assign(out[i * out_stride + d], 0.0f);
        }
        if (inside <= 0) continue;
        const Entries<T> k = head_of<T>(args.k, row, head);
        const Entries<T> v = head_of<T>(args.v, row, head);
        if (inside == 1) {
            for (int d = 0; d < dim; ++d) query[d] = to_float(q[d]);
            float largest, total;
            const PartSums sums = {result, &largest, &total};
            attend_heads<T>(query, 1, 0, first + 1, {k.data, k.stride, nullptr, 0},
                            {v.data, v.stride, nullptr, 0}, dim, args.scale, true, single_scratch,
                            sums);
            divide_by_total(sums, 1, dim);
            for (int d = 0; d < dim; ++d) gpt2fast::assign(out[d], result[d]);
        } else if (widens) {
            for (int64_t t = 0; t < first + inside; ++t) {
                for (int d = 0; d < dim; ++d) {
                    wide_k[t * dim + d] = to_float(k.data[t * k.stride + d]);
                    wide_v[t * dim + d] = to_float(v.data[t * v.stride + d]);
                }
            }
            attend_block<float>(q, args.q.entry_stride, inside, first, Entries<float>{wide_k, dim},
                                Entries<float>{wide_v, dim}, dim, args.scale, block_scratch, out,
                                out_stride, nullptr);
        } else {
            attend_block<T>(q, args.q.entry_stride, inside, first, k, v, dim, args.scale,
                            block_scratch, out, out_stride, nullptr);
        }
    }
}

inline void cached_attention(const CachedAttention& args, int64_t begin, int64_t end) {
    const bool narrow = args.dtype == DType::bfloat16, stored = args.cache_dtype == DType::bfloat16;
    if (narrow) {
        (stored ? attend_to_cache<bfloat16, bfloat16>
                : attend_to_cache<float, bfloat16>)(args, begin, end);
    } else {
        (stored ? attend_to_cache<bfloat16, float> : attend_to_cache<float, float>)(args, begin,
                                                                                    end);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
