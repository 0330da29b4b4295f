// Attention, backward, for 16-bit storage on tensor cores (Dao et al., 2022; Dao, 2023).
//
// With the weights P = exp(scores - lse), which are computed again, and the gradient dO of the
// result O:
//     dV = P' dO,  dP = dO V',  dS = P (dP - delta),  dQ = dS K,  dK = dS' Q,  delta = rowsum(dO O)
//
// FLOPs of a head with T positions of size D: five products, 10 T^2 D, or half of that where
// attention is causal: 2.5 times the forward pass. Bytes: 16 T D for five tensors read and three
// written, and dQ's sums in float32, read by every tile of the other side from the second-level
// cache. For D = 64 a tile of 128 x 64 pairs takes 1280 mma.m16n8k16 or 2560 clocks of an SM that
// does 1024 fused multiply-adds a clock, and reads 224 KiB from shared memory, or 1792 clocks.
//
// attention_statistics computes delta and puts it beside the log-sum in powers of two.
// attention_backward takes 128 keys of a head a block and goes over the queries that see them, of
// one head after another where several share the keys: dK and dV are sums in one order. Its warps
// hold scores with the keys down the rows, so that P' and dS' are first factors of dV and dK as
// they lie in the registers; only dS crosses shared memory, for dQ. A warp's own 32 values and some
// of its keys stay in registers, and every fragment of queries and gradients serves two products.
// dQ is summed with atomics into float32, in the order of the fragments, so that a warp adds to 128
// consecutive bytes; attention_grad_query rounds it.
// attention_backward_query computes dQ tile by tile instead, from scores with the queries down the
// rows, where the sum must not depend on the order of blocks: seven products instead of five.
//
// Given up, as nvcc 13 spilled registers: all of a warp's keys in registers beside its values, and
// what attention_forward.cuh lists.
//
// Not yet run on a GPU.
#pragma once

#include "attention.cuh"
#include "attention_tiles.cuh"

namespace gpt2fast::kernels {

template <typename T>
struct AttentionBackward {
    AttentionShape shape;
    Heads<const T> q, k, v, grad;
    Heads<T> grad_q, grad_k, grad_v;
    const float* statistics;
    // (batch, heads, padded_time, D): sums of dQ in fragments; null where it is computed apart.
    float* sums;
};

template <int D>
struct BackwardTiles {
    // Keys of a warp / 16: the accumulators of dK and dV take 128 registers at most.
    static constexpr int m = D <= 64 ? 2 : 1, warps = D <= 64 ? 4 : 8, threads = 32 * warps;
    static constexpr int keys = 16 * m * warps;
    static constexpr int queries = D <= 96 ? 64 : 32;
    // How warps share the product dS K.
    static constexpr int warps_across = D <= 96 ? 2 : 4, warps_down = warps / warps_across;
    static constexpr int product_m = queries / 16 / warps_down, product_columns = D / warps_across;
    static constexpr int keys_bytes = keys * Tile<D>::row_bytes;
    static constexpr int query_bytes = queries * Tile<D>::row_bytes;
    static constexpr int statistics_bytes = queries * 2 * int(sizeof(float));
    static constexpr int stage_bytes = 2 * query_bytes + statistics_bytes;
    // Before the values are in registers, they lie where the second stage or, if that is too
    // small, dS will be.
    static constexpr bool values_in_stage = keys_bytes <= stage_bytes;
    static constexpr int scores_bytes =
        values_in_stage ? keys * Tile<queries>::row_bytes : keys_bytes;
    static constexpr int shared_bytes = keys_bytes + scores_bytes + 2 * stage_bytes;
    static_assert(shared_bytes <= shared_memory_limit, "fits every GPU");
};

constexpr int attention_statistics_threads = 128;

template <typename T, int Width>
__global__ void __launch_bounds__(attention_statistics_threads)
    attention_statistics(const AttentionShape shape, const Heads<const T> grad,
                         const Heads<const T> out, const float* __restrict__ lse,
                         float* __restrict__ statistics) {
    const BlockPlace block;
    const int head_row = block.row(shape);
    const int first = block.tile * statistics_rows;
    const int64_t padded_row = head_row * padded_time(shape.time) + first;
    constexpr int lanes = 8;  // of a row
    constexpr int rows_at_once = attention_statistics_threads / lanes;
    const int lane = threadIdx.x % lanes;
    const T* grads = rows_of(grad, block, first);
    const T* outs = rows_of(out, block, first);
    for (int row = threadIdx.x / lanes; row < statistics_rows; row += rows_at_once) {
        const int t = first + row;
        float delta = 0.0f;
        if (t < shape.time) {
            for (int d = lane * Width; d < shape.head_dim; d += lanes * Width) {
                const auto g = load_vector<Width>(grads + row * grad.entry_stride + d);
                const auto o = load_vector<Width>(outs + row * out.entry_stride + d);
#pragma unroll
                for (int i = 0; i < Width; ++i) {
                    delta = fmaf(to_float(g.v[i]), to_float(o.v[i]), delta);
                }
            }
        }
#pragma unroll
        for (int step = 1; step < lanes; step *= 2) {
            delta += __shfl_xor_sync(0xffffffffu, delta, step);
        }
        if (lane == 0) {
            Vector<float, 2> both;
            both.v[0] = INFINITY;
            if (t < shape.time) both.v[0] = lse[int64_t(head_row) * shape.time + t] * log2_e;
            both.v[1] = delta;
            store_vector(statistics + (padded_row + row) * 2, both);
        }
    }
}

// Of a warp's D / 16 fragments of keys, those that stay in registers beside the values.
template <int D, bool Drops>
constexpr int held_keys = D == 64    ? 2 - Drops
                          : D == 128 ? 7 - Drops
                                     : D / 16;

// Bit 4 * m + e: whether the weight that accumulator e of rows m holds is dropped, for scores with
// the keys down the rows and `query` the thread's first column. The bits that a call draws are of
// one query and of eight keys, of which this thread holds every other, and the lane that holds the
// next row the rest: each calls for one of their two queries and hands over the other's half.
template <int M>
__device__ __forceinline__ uint32_t dropped(const Dropout& dropout, uint64_t seed, int head,
                                            int query, int first_key) {
    const int row = threadIdx.x % 32 / 4;
    const bool odd = row % 2;
    const RandomWords bits = dropout_words(seed, head, query + odd, first_key + row);
    uint32_t result = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const bool upper = M == 2 ? m == 1 : first_key / 16 % 2 == 1;
        const uint32_t x = upper ? bits.v[2] : bits.v[0], y = upper ? bits.v[3] : bits.v[1];
        const uint32_t even_keys = (x & 0xffffu) | y << 16, odd_keys = x >> 16 | (y & 0xffff0000u);
        const uint32_t own = odd ? odd_keys : even_keys;
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? even_keys : odd_keys, 4);
        const uint32_t left = odd ? other : own, right = odd ? own : other;
        const uint32_t drops = uint32_t((left & 0xffffu) < dropout.threshold) |
                               uint32_t((right & 0xffffu) < dropout.threshold) << 1 |
                               uint32_t((left >> 16) < dropout.threshold) << 2 |
                               uint32_t((right >> 16) < dropout.threshold) << 3;
        result |= drops << (4 * m);
    }
    return result;
}

template <typename T, int D, bool Drops>
__global__ void __launch_bounds__(BackwardTiles<D>::threads, D <= 64 ? 2 : 1)
    attention_backward(const AttentionBackward<T> args) {
    using Tiles = BackwardTiles<D>;
    using Layout = Tile<D>;
    using Scores = Tile<Tiles::queries>;
    constexpr int M = Tiles::m, Queries = Tiles::queries;
    GPT2FAST_SHARED(shared);
    const uint32_t key_tile = shared_address(shared);
    const uint32_t score_tile = key_tile + Tiles::keys_bytes;
    const uint32_t stages = score_tile + Tiles::scores_bytes;
    const uint32_t value_tile = Tiles::values_in_stage ? stages + Tiles::stage_bytes : score_tile;
    unsigned char* const stages_data = shared + Tiles::keys_bytes + Tiles::scores_bytes;

    const AttentionShape& shape = args.shape;
    const BlockPlace block;
    const int first_key = block.tile * Tiles::keys;  // the first tile is seen by the most queries
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_key = first_key + warp * M * 16;
    const int first_head = block.head * shape.group;
    // Of a query head's statistics and sums.
    const auto first_row = [&](const BlockPlace& place) {
        return place.row(shape) * padded_time(shape.time);
    };

    const auto copy_queries = [&](int member, int index, int stage) {
        const BlockPlace place = block.of_head(first_head + member);
        const int first = index * Queries;
        const uint32_t to = stages + uint32_t(stage * Tiles::stage_bytes);
        copy_tile<Queries, D, Tiles::threads>(to, args.q, first, place, shape);
        copy_tile<Queries, D, Tiles::threads>(to + Tiles::query_bytes, args.grad, first, place,
                                              shape);
        if (threadIdx.x < Tiles::statistics_bytes / 16) {
            cp_async<16>(to + 2 * Tiles::query_bytes + threadIdx.x * 16,
                         args.statistics + int64_t(first_row(place) + first) * 2 + threadIdx.x * 4);
        }
    };

    float grad_k[M][D / 8][4] = {}, grad_v[M][D / 8][4] = {};
    // Bit 2 * m + half: whether nobody sees key 16 * m + 8 * half + lane / 4 of the warp's.
    uint32_t hidden_keys = 0;
    const uint8_t* mask =
        shape.visible == nullptr ? nullptr : shape.visible + int64_t(block.batch) * shape.time;
#pragma unroll
    for (int row = 0; row < 2 * M; ++row) {
        const int key = warp_key + row * 8 + lane / 4;
        const bool hidden = key >= shape.time || (mask != nullptr && mask[key] == 0);
        hidden_keys |= uint32_t(hidden) << row;
    }
    bool any_visible = mask == nullptr;
    if (mask != nullptr) {
        for (int key = first_key + lane; key < min(first_key + Tiles::keys, shape.time);
             key += 32) {
            any_visible |= mask[key] != 0;
        }
        any_visible = __any_sync(0xffffffffu, any_visible);
    }

    const int tiles = (shape.time + Queries - 1) / Queries;
    const int first_tile = shape.causal ? first_key / Queries : 0;
    const int members = any_visible ? shape.group : 0;  // heads of queries
    if (members > 0) {
        copy_tile<Tiles::keys, D, Tiles::threads>(key_tile, args.k, first_key, block, shape);
        copy_tile<Tiles::keys, D, Tiles::threads>(value_tile, args.v, first_key, block, shape);
        copy_queries(0, first_tile, 0);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    }
    uint32_t keys[held_keys<D, Drops>][M][4], values[D / 16][M][4];
    const uint32_t own_rows = uint32_t(warp * M * 16 * Layout::row_bytes) + rows_first<D>();
    const auto read_own = [&](uint32_t (&fragments)[M][4], uint32_t tile, int d) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ldmatrix_x4(fragments[m], Layout::moved(tile + own_rows, m * 16, 2 * d));
        }
    };
    if (members > 0) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            if (d < held_keys<D, Drops>) read_own(keys[d], key_tile, d);
            read_own(values[d], value_tile, d);
        }
    }

    const float scale = shape.scale * log2_e;
    const Dropout& dropout = shape.dropout;
    const uint64_t seed = Drops ? uint64_t(*dropout.seed) : 0;
    static_assert(!Scores::permuted, "a place in the tile is a constant away");
    unsigned char* const own_scores =
        shared + Tiles::keys_bytes + Scores::offset(warp * M * 16 + lane / 4, 0) + lane % 4 * 4;

    for (int member = 0, index = first_tile, stage = 0; member < members; stage ^= 1) {
        cp_async_wait<0>();
        // These queries have come for everybody, and everybody is done with those before them and
        // with dS; the first time, with the values, whose place one or the other takes.
        __syncthreads();
        const bool last = index + 1 == tiles;
        const int next_member = member + last, next = last ? first_tile : index + 1;
        if (next_member < members) copy_queries(next_member, next, stage ^ 1);
        cp_async_commit();

        const BlockPlace queries_place = block.of_head(first_head + member);
        const uint32_t query_tile = stages + uint32_t(stage * Tiles::stage_bytes);
        const uint32_t grad_tile = query_tile + Tiles::query_bytes;
        const float* both = reinterpret_cast<const float*>(
            stages_data + stage * Tiles::stage_bytes + 2 * Tiles::query_bytes);
#pragma unroll
        for (int slice = 0; slice < Queries / 16; ++slice) {
            const int first_query = index * Queries + slice * 16;
            uint32_t weights[M][4] = {}, grad_scores[M][4] = {};
            if (!shape.causal || first_query + 15 >= warp_key) {
                float p[M][2][4] = {}, dp[M][2][4] = {};
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint32_t fragment[4];
                    ldmatrix_x4(fragment,
                                Layout::moved(query_tile + chunks_first<D>(), slice * 16, 2 * d));
                    if (d < held_keys<D, Drops>) {
                        multiply<T>(p, 0, keys[d], fragment);
                    } else {
                        uint32_t read_again[M][4];
                        read_own(read_again, key_tile, d);
                        multiply<T>(p, 0, read_again, fragment);
                    }
                    ldmatrix_x4(fragment,
                                Layout::moved(grad_tile + chunks_first<D>(), slice * 16, 2 * d));
                    multiply<T>(dp, 0, values[d], fragment);
                }
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int column = slice * 16 + n * 8 + lane % 4 * 2;
                    const int query = index * Queries + column;
                    const auto of_pair = load_vector<4>(both + 2 * column);
                    const uint32_t drops =
                        Drops ? dropped<M>(dropout, seed, queries_place.row(shape), query, warp_key)
                              : 0;
#pragma unroll
                    for (int m = 0; m < M; ++m) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            p[m][n][e] =
                                exp2_approx(fmaf(p[m][n][e], scale, -of_pair.v[e % 2 * 2]));
                        }
                    }
                    if (hidden_keys != 0 || (shape.causal && first_query < warp_key + M * 16 - 1)) {
#pragma unroll
                        for (int m = 0; m < M; ++m) {
#pragma unroll
                            for (int e = 0; e < 4; ++e) {
                                const int key = warp_key + m * 16 + e / 2 * 8 + lane / 4;
                                if ((shape.causal && key > query + e % 2) ||
                                    (hidden_keys >> (2 * m + e / 2) & 1)) {
                                    p[m][n][e] = 0.0f;
                                }
                            }
                        }
                    }
#pragma unroll
                    for (int m = 0; m < M; ++m) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const float delta = of_pair.v[e % 2 * 2 + 1];
                            if (!Drops) {
                                dp[m][n][e] = p[m][n][e] * (dp[m][n][e] - delta);
                            } else if (drops >> (4 * m + e) & 1) {
                                dp[m][n][e] = p[m][n][e] * -delta;
                                p[m][n][e] = 0.0f;
                            } else {
                                dp[m][n][e] = p[m][n][e] * fmaf(dp[m][n][e], dropout.scale, -delta);
                            }
                        }
                    }
                }
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    as_factor<T>(weights[m], p[m][0], p[m][1]);
                    as_factor<T>(grad_scores[m], dp[m][0], dp[m][1]);
                }
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint32_t fragment[4];
                    ldmatrix_x4_trans(
                        fragment, Layout::moved(grad_tile + rows_first<D>(), slice * 16, 2 * d));
                    multiply<T>(grad_v, 2 * d, weights, fragment);
                    ldmatrix_x4_trans(
                        fragment, Layout::moved(query_tile + rows_first<D>(), slice * 16, 2 * d));
                    multiply<T>(grad_k, 2 * d, grad_scores, fragment);
                }
            }
            if (args.sums != nullptr) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        *reinterpret_cast<uint32_t*>(
                            own_scores + Scores::offset(m * 16 + i % 2 * 8, slice * 2 + i / 2)) =
                            grad_scores[m][i];
                    }
                }
            }
        }
        if (args.sums != nullptr) {
            __syncthreads();
            const int across = warp % Tiles::warps_across, down = warp / Tiles::warps_across;
            float sums[Tiles::product_m][Tiles::product_columns / 8][4] = {};
            const uint32_t score_rows = score_tile + chunks_first<Queries>();
            const uint32_t key_rows = key_tile + rows_first<D>();
#pragma unroll
            for (int key = 0; key < Tiles::keys; key += 16) {
                uint32_t factor[Tiles::product_m][4];
#pragma unroll
                for (int m = 0; m < Tiles::product_m; ++m) {
                    ldmatrix_x4_trans(factor[m], Scores::moved(score_rows, key,
                                                               (down * Tiles::product_m + m) * 2));
                }
#pragma unroll
                for (int n = 0; n < Tiles::product_columns / 8; n += 2) {
                    uint32_t fragment[4];
                    ldmatrix_x4_trans(
                        fragment,
                        Layout::moved(key_rows, key, across * Tiles::product_columns / 8 + n));
                    multiply<T>(sums, n, factor, fragment);
                }
            }
            float* target = args.sums + int64_t(first_row(queries_place) + index * Queries) * D +
                            warp * (Queries * D / Tiles::warps) + lane;
#pragma unroll
            for (int i = 0; i < Queries * D / Tiles::threads; ++i) {
                constexpr int row = Tiles::product_columns / 2;
                atomicAdd(target + i * 32, sums[i / row][i / 4 % (row / 4)][i % 4]);
            }
        }
        member = next_member;
        index = next;
    }
    cp_async_wait<0>();
    __syncthreads();  // everybody is done with the keys, whose place the gradients take

    unsigned char* const own = shared + warp * M * 16 * Layout::row_bytes;
    store_rows<T, M, D>(
        own, grad_k, [&](int, int) { return shape.scale; }, args.grad_k, warp_key, block, shape);
    store_rows<T, M, D>(
        own, grad_v, [&](int, int) { return Drops ? dropout.scale : 1.0f; }, args.grad_v, warp_key,
        block, shape);
}

// Rounds the sums of dQ; a block takes a tile of queries, a thread what it has added up.
template <typename T, int D>
__global__ void __launch_bounds__(BackwardTiles<D>::threads)
    attention_grad_query(const AttentionBackward<T> args) {
    using Tiles = BackwardTiles<D>;
    constexpr int Queries = Tiles::queries, M = Tiles::product_m;
    const AttentionShape& shape = args.shape;
    const BlockPlace block;
    const int padded = padded_time(shape.time);
    const int first_query = block.tile * Queries;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int across = warp % Tiles::warps_across, down = warp / Tiles::warps_across;
    const float* source = args.sums + int64_t(block.row(shape) * padded + first_query) * D +
                          warp * (Queries * D / Tiles::warps) + lane;
    T* target = rows_of(args.grad_q, block, first_query);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < Tiles::product_columns / 8; ++n) {
            const int column = across * Tiles::product_columns + n * 8 + lane % 4 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = (m * (Tiles::product_columns / 8) + n) * 4 + half * 2;
                const int row = (down * M + m) * 16 + half * 8 + lane / 4;
                if (row < shape.time - first_query && column < shape.head_dim) {
                    Vector<T, 2> pair;
                    pair.v[0] = from_float<T>(source[i * 32] * shape.scale);
                    pair.v[1] = from_float<T>(source[(i + 1) * 32] * shape.scale);
                    store_vector(target + row * args.grad_q.entry_stride + column, pair);
                }
            }
        }
    }
}

template <int D>
struct BackwardQueryTiles {
    static constexpr int m = D <= 64 ? 2 : 1, warps = D <= 96 ? 4 : 8, threads = 32 * warps;
    static constexpr int queries = 16 * m * warps;
    static constexpr int keys = D <= 96 ? 64 : 32;
    static constexpr int query_bytes = queries * Tile<D>::row_bytes;
    static constexpr int stage_bytes = 2 * keys * Tile<D>::row_bytes;
    static constexpr int shared_bytes = 2 * query_bytes + 2 * stage_bytes;
    static_assert(shared_bytes <= shared_memory_limit, "fits every GPU");
};

// dQ of a tile of queries, without atomics.
template <typename T, int D, bool Drops>
__global__ void __launch_bounds__(BackwardQueryTiles<D>::threads, D <= 96 ? 2 : 1)
    attention_backward_query(const AttentionBackward<T> args) {
    using Tiles = BackwardQueryTiles<D>;
    using Layout = Tile<D>;
    constexpr int M = Tiles::m, Keys = Tiles::keys;
    GPT2FAST_SHARED(shared);
    const uint32_t query_tile = shared_address(shared);
    const uint32_t grad_tile = query_tile + Tiles::query_bytes;
    const uint32_t stages = grad_tile + Tiles::query_bytes;

    const AttentionShape& shape = args.shape;
    const BlockPlace block, keys_place = block.of_key_head(shape);
    const int head_row = block.row(shape);
    const int first_query = (int(gridDim.y) - 1 - block.tile) * Tiles::queries;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_query = first_query + warp * M * 16;
    const int query = warp_query + lane / 4;
    const int warp_end = warp_query < shape.time ? end_of_keys(shape, warp_query + M * 16) : 0;
    const int padded = padded_time(shape.time);

    const uint8_t* mask =
        shape.visible == nullptr ? nullptr : shape.visible + int64_t(block.batch) * shape.time;
    const auto copy_keys = [&](int index, int stage) {
        const uint32_t to = stages + uint32_t(stage * Tiles::stage_bytes);
        copy_tile<Keys, D, Tiles::threads>(to, args.k, index * Keys, keys_place, shape);
        copy_tile<Keys, D, Tiles::threads>(to + Tiles::stage_bytes / 2, args.v, index * Keys,
                                           keys_place, shape);
    };

    const int tiles = (end_of_keys(shape, first_query + Tiles::queries) + Keys - 1) / Keys;
    VisibleKeys<Keys> visible{}, visible_next{};
    int index = next_visible<Keys>(mask, shape.time, 0, tiles, visible);
    copy_tile<Tiles::queries, D, Tiles::threads>(query_tile, args.q, first_query, block, shape);
    copy_tile<Tiles::queries, D, Tiles::threads>(grad_tile, args.grad, first_query, block, shape);
    if (index < tiles) copy_keys(index, 0);
    cp_async_commit();

    const float scale = shape.scale * log2_e;
    const Dropout& dropout = shape.dropout;
    const uint64_t seed = Drops ? uint64_t(*dropout.seed) : 0;
    float log_sum[M][2], delta[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = query + m * 16 + half * 8;
            log_sum[m][half] = INFINITY;
            delta[m][half] = 0.0f;
            if (row < shape.time) {
                const auto both =
                    load_vector<2>(args.statistics + int64_t(head_row * padded + row) * 2);
                log_sum[m][half] = both.v[0];
                delta[m][half] = both.v[1];
            }
        }
    }

    float grad_q[M][D / 8][4] = {};
    uint32_t queries[D / 16][M][4], grads[D / 16][M][4];
    const uint32_t own = uint32_t(warp * M * 16 * Layout::row_bytes);
    bool first = true;
    for (int stage = 0; index < tiles; stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        const int next = next_visible<Keys>(mask, shape.time, index + 1, tiles, visible_next);
        if (next < tiles) copy_keys(next, stage ^ 1);
        cp_async_commit();

        const int first_key = index * Keys;
        if (first) {
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const uint32_t rows = own + rows_first<D>();
                    ldmatrix_x4(queries[d][m], Layout::moved(query_tile + rows, m * 16, 2 * d));
                    ldmatrix_x4(grads[d][m], Layout::moved(grad_tile + rows, m * 16, 2 * d));
                }
            }
            first = false;
        }
        const uint32_t keys = stages + uint32_t(stage * Tiles::stage_bytes);
        const uint32_t values = keys + Tiles::stage_bytes / 2;
#pragma unroll
        for (int slice = 0; slice < Keys / 16; ++slice) {
            const int slice_key = first_key + slice * 16;
            if (slice_key >= warp_end) continue;
            float p[M][2][4] = {}, dp[M][2][4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t fragment[4];
                ldmatrix_x4(fragment, Layout::moved(keys + chunks_first<D>(), slice * 16, 2 * d));
                multiply<T>(p, 0, queries[d], fragment);
                ldmatrix_x4(fragment, Layout::moved(values + chunks_first<D>(), slice * 16, 2 * d));
                multiply<T>(dp, 0, grads[d], fragment);
            }
            const bool masked = mask != nullptr || first_key + Keys > shape.time;
            const bool edge = masked || (shape.causal && slice_key + 15 > warp_query);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = query + m * 16 + half * 8;
                    RandomWords bits{};
                    if constexpr (Drops) {
                        bits = dropout_words(seed, head_row, row, slice_key + lane % 4 * 2);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int n = i / 2, e = half * 2 + i % 2;
                        const int column = n * 8 + lane % 4 * 2 + i % 2;
                        float& weight = p[m][n][e];
                        weight = exp2_approx(fmaf(weight, scale, -log_sum[m][half]));
                        if (edge && ((shape.causal && slice_key + column > row) ||
                                     (masked && !visible[slice * 16 + column]))) {
                            weight = 0.0f;
                        }
                        float& grad_weight = dp[m][n][e];
                        if constexpr (Drops) {
                            const uint32_t draw = bits.v[slice % 2 * 2 + n] >> (16 * (i % 2));
                            grad_weight = (draw & 0xffffu) < dropout.threshold
                                              ? 0.0f
                                              : grad_weight * dropout.scale;
                        }
                        grad_weight = weight * (grad_weight - delta[m][half]);
                    }
                }
            }
            uint32_t factor[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) as_factor<T>(factor[m], dp[m][0], dp[m][1]);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t fragment[4];
                ldmatrix_x4_trans(fragment,
                                  Layout::moved(keys + rows_first<D>(), slice * 16, 2 * d));
                multiply<T>(grad_q, 2 * d, factor, fragment);
            }
        }
        index = next;
        visible = visible_next;
    }
    cp_async_wait<0>();
    __syncthreads();

    store_rows<T, M, D>(
        shared + own, grad_q, [&](int, int) { return shape.scale; }, args.grad_q, warp_query, block,
        shape);
}

}  // namespace gpt2fast::kernels
