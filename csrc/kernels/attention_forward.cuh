// Attention, forward, for 16-bit storage on tensor cores (Dao et al., 2022; Dao, 2023).
//
// FLOPs of a head with T positions of size D: 4 T^2 D and T^2 exponentials, or half of both where
// attention is causal. Bytes: 8 T D for query, key, value and result, and 4 T for the log-sums;
// keys and values are read again by every tile of queries and every head that shares them, from
// the second-level cache. Intensity of causal attention is about T / 4 FLOPs a byte: from T = 1k
// on, arithmetic is the floor. For D = 64 a tile of 128 x 64 takes 512 mma.m16n8k16 and 8192
// exponentials; an SM that does 1024 fused multiply-adds and 16 exponentials a clock needs 1024 and
// 512 clocks for them.
//
// A block takes 128 queries of a head, each of its four warps 32, so that every fragment of keys
// and values that is read from shared memory serves two products: with 16 rows a warp, shared
// memory would be as slow as the tensor cores of an A100. Two stages of keys and values; one
// barrier a tile. Only warps on the diagonal or past the last key hide scores, and those beyond the
// diagonal skip the tile. The result leaves through shared memory, 16 bytes a lane. Two blocks fit
// on an SM.
//
// Given up, as nvcc 13 spilled registers: dropout in the same instantiation, since drawing needs
// the registers of the queries; tiles with permuted chunks instead of padded rows, which take a
// register for each place; a grid of one dimension, since what follows from a division is not
// uniform to the compiler and the tensors' addresses took vector registers.
//
// Not yet run on a GPU.
#pragma once

#include "attention_softmax.cuh"
#include "attention_tiles.cuh"

namespace gpt2fast::kernels {

template <typename T>
struct AttentionForward {
    AttentionShape shape;
    Heads<const T> q, k, v;
    Heads<T> out;
    float* lse;  // (batch, heads, time)
};

template <int D, bool Drops>
struct ForwardTiles {
    static constexpr int queries = 128, warps = 4, threads = 32 * warps;
    static constexpr int m = queries / warps / 16;
    // As many registers as the accumulators and the drawing of random bits leave.
    static constexpr int keys = D + 32 * Drops <= 96 ? 64 : 32;
    static constexpr bool queries_in_registers = D + 32 * Drops <= 64;
    static constexpr int query_bytes = queries * Tile<D>::row_bytes;
    static constexpr int stage_bytes = 2 * keys * Tile<D>::row_bytes;
    static constexpr int shared_bytes = query_bytes + 2 * stage_bytes;
    static_assert(shared_bytes <= shared_memory_limit, "fits every GPU");
};

// Sets the scores of pairs that are hidden to -infinity. `limit` is the last key of the tile that
// row lane / 4 sees, the next row sees one more.
template <int M, int Keys>
__device__ __forceinline__ void hide(float (&scores)[M][Keys / 8][4], int limit, bool masked,
                                     const VisibleKeys<Keys>& visible) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int key = n * 8 + column + odd;
            const bool hidden = masked && !visible[key];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (hidden || key > limit + m * 16 + half * 8) {
                        scores[m][n][2 * half + odd] = -INFINITY;
                    }
                }
            }
        }
    }
}

// Zeroes the weights that are dropped; `query` is the one of row lane / 4.
template <int M, int Keys>
__device__ __forceinline__ void drop(float (&weights)[M][Keys / 8][4], const Dropout& dropout,
                                     uint64_t seed, int head, int query, int first_key) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int group = 0; group < Keys / 32; ++group) {
                const RandomWords bits = dropout_words(seed, head, query + m * 16 + half * 8,
                                                       first_key + group * 32 + column);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    float* pair = &weights[m][group * 4 + n][2 * half];
                    if ((bits.v[n] & 0xffffu) < dropout.threshold) pair[0] = 0.0f;
                    if ((bits.v[n] >> 16) < dropout.threshold) pair[1] = 0.0f;
                }
            }
        }
    }
}

template <typename T, int D, bool Drops>
__global__ void __launch_bounds__(ForwardTiles<D, Drops>::threads, 2)
    attention_forward(const AttentionForward<T> args) {
    using Tiles = ForwardTiles<D, Drops>;
    using Layout = Tile<D>;
    constexpr int M = Tiles::m, Keys = Tiles::keys;
    GPT2FAST_SHARED(shared);
    const uint32_t query_tile = shared_address(shared);
    const uint32_t stages = query_tile + Tiles::query_bytes;

    const AttentionShape& shape = args.shape;
    const BlockPlace block, keys_place = block.of_key_head(shape);
    const int head_row = block.row(shape);
    const int first_query = (int(gridDim.y) - 1 - block.tile) * Tiles::queries;  // longest first
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_query = first_query + warp * M * 16;
    const int query = warp_query + lane / 4;
    const int warp_end = warp_query < shape.time ? end_of_keys(shape, warp_query + M * 16) : 0;

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
    if (index < tiles) copy_keys(index, 0);
    cp_async_commit();

    const bool negative = shape.scale < 0.0f;
    // Hidden scores are -infinity, which a scale of 0 would turn into something else.
    const float scale = fmaxf(fabsf(shape.scale) * log2_e, 1e-30f);
    const uint64_t seed = Drops ? uint64_t(*shape.dropout.seed) : 0;

    OnlineSoftmax<M> softmax;
    float out[M][D / 8][4] = {};
    uint32_t queries[Tiles::queries_in_registers ? D / 16 : 1][M][4];
    const uint32_t own_queries = query_tile + uint32_t(warp * M * 16 * Layout::row_bytes);
    const uint32_t query_rows = own_queries + rows_first<D>();
    const auto read_queries = [&](uint32_t (&fragments)[M][4], int d) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            ldmatrix_x4(fragments[m], Layout::moved(query_rows, m * 16, 2 * d));
        }
    };

    bool first = true;
    for (int stage = 0; index < tiles; stage ^= 1) {
        cp_async_wait<0>();
        // This tile has come for everybody, and everybody is done with the tile before it.
        __syncthreads();
        const int next = next_visible<Keys>(mask, shape.time, index + 1, tiles, visible_next);
        if (next < tiles) copy_keys(next, stage ^ 1);
        cp_async_commit();

        const int first_key = index * Keys;
        if (Tiles::queries_in_registers && first) {
#pragma unroll
            for (int d = 0; d < D / 16; ++d) read_queries(queries[d], d);
            first = false;
        }
        if (first_key < warp_end) {
            const uint32_t keys = stages + uint32_t(stage * Tiles::stage_bytes);
            const uint32_t key_rows = keys + chunks_first<D>();
            float scores[M][Keys / 8][4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                if (!Tiles::queries_in_registers) read_queries(queries[0], d);
#pragma unroll
                for (int n = 0; n < Keys / 16; ++n) {
                    uint32_t fragment[4];
                    ldmatrix_x4(fragment, Layout::moved(key_rows, n * 16, 2 * d));
                    multiply<T>(scores, 2 * n, queries[Tiles::queries_in_registers ? d : 0],
                                fragment);
                }
            }
            if (negative) {
#pragma unroll
                for (int i = 0; i < M * Keys / 2; ++i) {
                    float& score = scores[i / (Keys / 2)][i / 4 % (Keys / 8)][i % 4];
                    score = -score;
                }
            }
            const bool masked = mask != nullptr || first_key + Keys > shape.time;
            if (masked || (shape.causal && first_key + Keys - 1 > warp_query)) {
                hide<M, Keys>(scores, shape.causal ? query - first_key : Keys, masked, visible);
            }
            softmax.add(scores, scale, out);
            if constexpr (Drops) {
                drop<M, Keys>(scores, shape.dropout, seed, head_row, query, first_key);
            }

            const uint32_t value_rows = keys + Tiles::stage_bytes / 2 + rows_first<D>();
#pragma unroll
            for (int n = 0; n < Keys / 16; ++n) {
                uint32_t weights[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    as_factor<T>(weights[m], scores[m][2 * n], scores[m][2 * n + 1]);
                }
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    uint32_t fragment[4];
                    ldmatrix_x4_trans(fragment, Layout::moved(value_rows, n * 16, 2 * d));
                    multiply<T>(out, 2 * d, weights, fragment);
                }
            }
        }
        index = next;
        visible = visible_next;
    }
    cp_async_wait<0>();
    // Where no key is visible, nobody has waited for the queries, whose rows the result now takes.
    __syncthreads();

    softmax.finish();
    if (lane % 4 == 0) {
        float* lse = args.lse + int64_t(head_row) * shape.time;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = query + m * 16 + half * 8;
                if (row < shape.time) lse[row] = softmax.log_sum(m, half);
            }
        }
    }
    store_rows<T, M, D>(
        shared + warp * M * 16 * Layout::row_bytes, out,
        [&](int m, int half) {
            return softmax.inverse(m, half) * (Drops ? shape.dropout.scale : 1.0f);
        },
        args.out, warp_query, block, shape);
}

}  // namespace gpt2fast::kernels
