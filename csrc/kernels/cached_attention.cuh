// Attention of one query or a few to a cache of keys and values, ragged lengths on the device.
//
// Each of a row's entries is read once a tile of queries: 2 * head size * (lengths + T) elements a
// head, 4 operations an element and query, so that reading is the floor (124M in bfloat16, 1024
// entries: 3 MiB a row and layer, 0.7 us at 4.8 TB/s). An int8 entry of 64 elements takes 68 bytes
// with its factor, 0.53 of bfloat16's 128: 1.6 MiB, 0.35 us. Factors multiply scores and weights,
// not elements, each of which costs two instructions more. Not yet run on a GPU.
//
// The entries of a row are split among blocks ("flash decoding", Dao et al., 2023), as many as the
// shape asks for; how many entries a block takes follows from the row's length, so that one launch
// serves every position, and blocks for which nothing is left return at once. In a block, groups of
// lanes take an entry each, 16 bytes of a key and a value a lane, with an online softmax of their
// own (Milakov & Gimelshein, 2018). Groups, then warps, then blocks are merged in a fixed order.
#pragma once

#include "cache.cuh"
#include "elements.cuh"
#include "ticket.cuh"

namespace gpt2fast::kernels {

constexpr int cached_attention_threads = 128;
constexpr int cached_attention_warps = cached_attention_threads / 32;
constexpr int cached_attention_unroll = 4;  // entries that a group has under way

template <typename C>
struct CachedAttentionArgs {
    const void* q;  // (batch, time, heads, head_dim), the last dimension contiguous
    void* out;      // as q, contiguous
    DType q_dtype;
    int64_t q_row_stride, q_time_stride, q_head_stride;
    Heads<const C> k, v;
    Heads<const float> k_scales, v_scales;  // of int8 caches: (rows, entries, heads)
    Integers lengths;
    float* partials;    // (batch, time, heads, splits, head_dim + 2)
    unsigned* tickets;  // (batch, gridDim.y) zeros
    int time, heads, head_dim, entries, splits;
    float scale;  // times log2(e)
};

// The sum over a set of entries: sum_s 2^(score_s - maximum) * (1, v_s).
template <int Values>
struct SoftmaxSum {
    float maximum = -INFINITY;
    float total = 0.0f;
    float values[Values] = {};

    // Makes room for scores up to `score`.
    __device__ __forceinline__ void raise(float score) {
        const float higher = fmaxf(maximum, score);
        if (higher == maximum) return;
        const float factor = exp2_approx(maximum - higher);
        maximum = higher;
        total *= factor;
#pragma unroll
        for (int i = 0; i < Values; ++i) values[i] *= factor;
    }
};

__device__ __forceinline__ float softmax_factor(float maximum, float of_all) {
    return maximum == -INFINITY ? 0.0f : exp2_approx(maximum - of_all);
}

// Floats of shared memory.
template <int Queries>
constexpr int cached_attention_shared(int head_dim) {
    return cached_attention_warps * Queries * (head_dim + 2) + 1;
}

// Blocks of a multiprocessor that registers must suffice for, where a few lie above a step; 0: as
// the compiler likes.
template <typename C, int Width, int Queries>
constexpr int cached_attention_blocks = Queries > 1                               ? 0
                                        : std::is_same_v<C, float> && Width == 4  ? 8
                                        : std::is_same_v<C, int8_t> && Width == 1 ? 5
                                                                                  : 0;

// Block (split, head and tile of queries, row). A group of `Lanes` lanes reads an entry, each of
// them `Vectors` vectors of `Width` elements that lie Lanes * Width apart; a tile has `Queries`.
template <typename C, int Width, int Lanes, int Vectors, int Queries>
__global__ void __launch_bounds__(cached_attention_threads,
                                  (cached_attention_blocks<C, Width, Queries>))
    cached_attention(const CachedAttentionArgs<C> args) {
    constexpr int values = Width * Vectors;
    constexpr int groups = cached_attention_threads / Lanes;
    constexpr int unroll = cached_attention_unroll;
    constexpr bool is_int8 = std::is_same_v<C, int8_t>;
    const int head = int(blockIdx.y) % args.heads;
    const int first_query = int(blockIdx.y) / args.heads * Queries;
    const int64_t row = blockIdx.z;
    const int head_dim = args.head_dim;
    const int group = int(threadIdx.x) / Lanes;
    const int column = int(threadIdx.x) % Lanes * Width;

    // The entries that the newest query sees, and this block's share of them.
    const int64_t length = args.lengths[row];
    const auto seen_by = [&](int query) {
        return int(min(length + first_query + query + 1, int64_t(args.entries)));
    };
    const int seen = seen_by(min(Queries, args.time - first_query) - 1);
    constexpr int step = groups * unroll;
    const int share = max(step, ((seen + args.splits - 1) / args.splits + step - 1) / step * step);
    const int busy = (seen + share - 1) / share;  // blocks that have something to do
    const int begin = int(blockIdx.x) * share;
    if (begin >= seen) return;
    const int end = min(begin + share, seen);

    float q[Queries][values];
    const auto read_queries = [&](const auto* from) {
#pragma unroll
        for (int j = 0; j < Queries; ++j) {
            const int query = min(first_query + j, args.time - 1);
            const int64_t at =
                row * args.q_row_stride + query * args.q_time_stride + head * args.q_head_stride;
#pragma unroll
            for (int i = 0; i < values; ++i) {
                const int c = column + i / Width * Lanes * Width + i % Width;
                q[j][i] = c < head_dim ? to_float(from[at + c]) * args.scale : 0.0f;
            }
        }
    };
    // Once, not for each element: the loads of a branch wait for those of the one before.
    with_dtype(args.q, args.q_dtype, read_queries);

    SoftmaxSum<values> sums[Queries];
    for (int base = begin; base < end; base += step) {
        Elements<C, Width> k[unroll][Vectors], v[unroll][Vectors];
        float k_scales[unroll], v_scales[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const int entry = base + u * groups + group;
#pragma unroll
            for (int i = 0; i < Vectors; ++i) {
                const int c = column + i * Lanes * Width;
                if (entry < end && c < head_dim) {
                    k[u][i].load(args.k.at(row, entry, head) + c);
                    v[u][i].load(args.v.at(row, entry, head) + c);
                } else {
                    k[u][i] = v[u][i] = Elements<C, Width>{};
                }
            }
            if constexpr (is_int8) {
                k_scales[u] = entry < end ? *args.k_scales.at(row, entry, head) : 0.0f;
                v_scales[u] = entry < end ? *args.v_scales.at(row, entry, head) : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < Queries; ++j) {
            float scores[unroll];
            float highest = -INFINITY;
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < values; ++i) {
                    score += q[j][i] * k[u][i / Width][i % Width];
                }
#pragma unroll
                for (int distance = Lanes / 2; distance > 0; distance /= 2) {
                    score += __shfl_xor_sync(all_lanes, score, distance);
                }
                if constexpr (is_int8) score *= k_scales[u];
                const int entry = base + u * groups + group;
                scores[u] = entry < min(end, seen_by(j)) ? score : -INFINITY;
                highest = fmaxf(highest, scores[u]);
            }
            sums[j].raise(highest);
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                // Values that a query doesn't see may be NaN, and 0 * NaN is NaN.
                if (base + u * groups + group >= min(end, seen_by(j))) continue;
                // -infinity minus a maximum of -infinity would be NaN.
                const float weight =
                    scores[u] == -INFINITY ? 0.0f : exp2_approx(scores[u] - sums[j].maximum);
                sums[j].total += weight;
                float factor = weight;
                if constexpr (is_int8) factor *= v_scales[u];
#pragma unroll
                for (int i = 0; i < values; ++i) {
                    sums[j].values[i] += factor * v[u][i / Width][i % Width];
                }
            }
        }
    }

    // The groups of a warp.
#pragma unroll
    for (int j = 0; j < Queries; ++j) {
#pragma unroll
        for (int distance = Lanes; distance < 32; distance *= 2) {
            const float other = __shfl_xor_sync(all_lanes, sums[j].maximum, distance);
            const float highest = fmaxf(sums[j].maximum, other);
            const float mine = softmax_factor(sums[j].maximum, highest);
            const float theirs = softmax_factor(other, highest);
            const float total = __shfl_xor_sync(all_lanes, sums[j].total, distance);
            sums[j].maximum = highest;
            sums[j].total = sums[j].total * mine + total * theirs;
#pragma unroll
            for (int i = 0; i < values; ++i) {
                const float value = __shfl_xor_sync(all_lanes, sums[j].values[i], distance);
                sums[j].values[i] = sums[j].values[i] * mine + value * theirs;
            }
        }
    }

    // The warps of a block.
    GPT2FAST_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    const int size = head_dim + 2;  // of a sum: values, maximum, total
    if (threadIdx.x % 32 < Lanes) {
#pragma unroll
        for (int j = 0; j < Queries; ++j) {
            float* to = shared + (threadIdx.x / 32 * Queries + j) * size;
#pragma unroll
            for (int i = 0; i < values; ++i) {
                const int c = column + i / Width * Lanes * Width + i % Width;
                if (c < head_dim) to[c] = sums[j].values[i];
            }
            if (threadIdx.x % Lanes == 0) {
                to[head_dim] = sums[j].maximum;
                to[head_dim + 1] = sums[j].total;
            }
        }
    }
    __syncthreads();
    // Calls finish(query, column, maximum, total, value) with the total of `count` sums; those of
    // query j begin at from(j), `stride` apart.
    const auto merge = [&](auto from, int64_t stride, int count, auto finish) {
        for (int i = int(threadIdx.x); i < Queries * head_dim; i += cached_attention_threads) {
            const int j = i / head_dim, c = i % head_dim;
            if (first_query + j >= args.time) continue;
            const float* sum = from(j);
            float maximum = -INFINITY, total = 0.0f, value = 0.0f;
            for (int n = 0; n < count; ++n) maximum = fmaxf(maximum, sum[n * stride + head_dim]);
            for (int n = 0; n < count; ++n) {
                const float factor = softmax_factor(sum[n * stride + head_dim], maximum);
                total += factor * sum[n * stride + head_dim + 1];
                value += factor * sum[n * stride + c];
            }
            finish(j, c, maximum, total, value);
        }
    };
    const auto item = [&](int j) {
        return (row * args.time + first_query + j) * args.heads + head;
    };
    const auto write = [&](int j, int c, float, float total, float value) {
        store_float(args.out, args.q_dtype, item(j) * head_dim + c,
                    total == 0.0f ? 0.0f : value / total);
    };
    const auto in_shared = [&](int j) { return shared + j * size; };
    const auto in_partials = [&](int j) { return args.partials + item(j) * args.splits * size; };
    if (busy == 1) return merge(in_shared, Queries * size, cached_attention_warps, write);

    // The blocks of a row.
    merge(in_shared, Queries * size, cached_attention_warps,
          [&](int j, int c, float maximum, float total, float value) {
              float* to = in_partials(j) + blockIdx.x * size;
              to[c] = value;
              if (c == 0) {
                  to[head_dim] = maximum;
                  to[head_dim + 1] = total;
              }
          });
    unsigned* const flag =
        reinterpret_cast<unsigned*>(shared + cached_attention_warps * Queries * size);
    if (is_last_block(args.tickets + row * gridDim.y + blockIdx.y, unsigned(busy), flag)) {
        merge(in_partials, size, busy, write);
    }
}

}  // namespace gpt2fast::kernels
