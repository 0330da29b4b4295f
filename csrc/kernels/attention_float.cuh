// Attention, forward and backward, in float32 without tensor cores, whose products of float32 are
// rounded to 10 bits.
//
// FLOPs as in attention_forward.cuh and, the backward pass computing the scores twice so that
// nothing needs atomics, 14 T^2 D a head, or half of that where attention is causal. An SM does 128
// fused multiply-adds a clock: arithmetic is the floor. A thread computes 4 x 4 scores from vectors
// of 4: 8 loads of 16 bytes for 64 multiply-adds.
//
// A block of 128 threads takes 16 * R rows (queries, or keys where it computes their gradients)
// and goes over the columns 32 at a time. Eight threads share R rows: their rows' maxima and sums
// are shuffles, and the weights reach shared memory for their own warp only.
//
// Not yet run on a GPU.
#pragma once

#include "attention.cuh"
#include "attention_softmax.cuh"

namespace gpt2fast::kernels {

struct AttentionFloatForward {
    AttentionShape shape;
    Heads<const float> q, k, v;
    Heads<float> out;
    float* lse;  // (batch, heads, time)
};

struct AttentionFloatBackward {
    AttentionShape shape;
    Heads<const float> q, k, v, grad;
    Heads<float> grad_q, grad_k, grad_v;
    const float* statistics;  // as in attention_backward.cuh
};

constexpr int float_threads = 128, float_columns = 32;

template <int D, int R>
struct FloatTiles {
    static constexpr int rows = 16 * R;
    // Rows of 4 floats more than a multiple of 32: eight rows' vectors lie in different banks.
    static constexpr int pitch = D + 4, weights_pitch = float_columns + 4;
    static constexpr int row_floats = rows * pitch, column_floats = float_columns * pitch;
    static constexpr int weight_floats = rows * weights_pitch;
    static constexpr int forward_bytes =
        (row_floats + 2 * column_floats + weight_floats) * int(sizeof(float));
    static constexpr int backward_query_bytes =
        (2 * row_floats + 2 * column_floats + weight_floats) * int(sizeof(float));
    static constexpr int backward_bytes =
        (2 * row_floats + 2 * column_floats + 2 * weight_floats) * int(sizeof(float));
    static_assert(forward_bytes <= shared_memory_limit, "fits every GPU");
};

// Wide heads leave room for fewer rows of two tensors.
template <int D>
constexpr int float_backward_rows = D <= 64 ? 4 : 2;

// A thread's place: rows place.row + 8 * i and columns place.column + 8 * j, or the four columns
// 4 * place.column + 32 * j of a head's size. All its rows have the same remainder by 8 and lie in
// the same 32, so that one call of dropout_words serves all, if rows are keys.
struct Place {
    int row, column;
};

template <int R>
__device__ __forceinline__ Place place_of_thread() {
    const int group = threadIdx.x / 8;
    return {group % 8 + group / 8 * R * 8, int(threadIdx.x % 8)};
}

// Zeroes past the rows and columns that exist, so that products need no bounds.
template <int Rows, int D>
__device__ __forceinline__ void copy_floats(float* tile, const Heads<const float>& heads, int first,
                                            const BlockPlace& block, const AttentionShape& shape) {
    const float* source = rows_of(heads, block, first);
    for (int i = threadIdx.x; i < Rows * D; i += float_threads) {
        const int row = i / D, column = i % D;
        const bool valid = row < shape.time - first && column < shape.head_dim;
        cp_async<4>(shared_address(tile + row * (D + 4) + column),
                    source + row * heads.entry_stride + column, valid);
    }
}

// products[i][j] = sum over d of rows[place.row + 8 i][d] * columns[place.column + 8 j][d]
template <int D, int R>
__device__ __forceinline__ void multiply_rows(float (&products)[R][4], const float* rows,
                                              const float* columns, Place place) {
    constexpr int pitch = D + 4;
    float sums[R][4] = {};
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        Vector<float, 4> a[R], b[4];
#pragma unroll
        for (int i = 0; i < R; ++i) a[i] = load_vector<4>(rows + (place.row + 8 * i) * pitch + d);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            b[j] = load_vector<4>(columns + (place.column + 8 * j) * pitch + d);
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int x = 0; x < 4; ++x) sums[i][j] = fmaf(a[i].v[x], b[j].v[x], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) products[i][j] = sums[i][j];
    }
}

// sums[i][...] += sum over columns c of weights[place.row + 8 i][c] * values[c][...]
template <int D, int R>
__device__ __forceinline__ void multiply_weights(float (&sums)[R][D / 8], const float* weights,
                                                 const float* values, Place place) {
    constexpr int pitch = D + 4, weights_pitch = float_columns + 4;
#pragma unroll 2
    for (int c = 0; c < float_columns; c += 4) {
        Vector<float, 4> a[R];
#pragma unroll
        for (int i = 0; i < R; ++i) {
            a[i] = load_vector<4>(weights + (place.row + 8 * i) * weights_pitch + c);
        }
#pragma unroll
        for (int x = 0; x < 4; ++x) {
#pragma unroll
            for (int j = 0; j < D / 32; ++j) {
                const auto b = load_vector<4>(values + (c + x) * pitch + 32 * j + 4 * place.column);
#pragma unroll
                for (int i = 0; i < R; ++i) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        sums[i][4 * j + e] = fmaf(a[i].v[x], b.v[e], sums[i][4 * j + e]);
                    }
                }
            }
        }
    }
}

template <int R>
__device__ __forceinline__ void store_weights(float* weights, const float (&values)[R][4],
                                              Place place) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            weights[(place.row + 8 * i) * (float_columns + 4) + place.column + 8 * j] =
                values[i][j];
        }
    }
}

template <int D, int R>
__device__ __forceinline__ void store_sums(const float (&sums)[R][D / 8], const Heads<float>& heads,
                                           int first, const BlockPlace& block,
                                           const AttentionShape& shape, Place place) {
    float* target = rows_of(heads, block, first);
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const int row = place.row + 8 * i;
        if (row >= shape.time - first) continue;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const int column = j / 4 * 32 + 4 * place.column + j % 4;
            if (column < shape.head_dim) target[row * heads.entry_stride + column] = sums[i][j];
        }
    }
}

__device__ __forceinline__ bool is_dropped(const RandomWords& bits, int key,
                                           const Dropout& dropout) {
    const int word = key / 8 % 4;  // chosen without an index, which would put them into memory
    const uint32_t low = word % 2 == 0 ? bits.v[0] : bits.v[1];
    const uint32_t high = word % 2 == 0 ? bits.v[2] : bits.v[3];
    const uint32_t both = word < 2 ? low : high;
    return (both >> (16 * (key % 2)) & 0xffffu) < dropout.threshold;
}

template <int D, int R>
__global__ void __launch_bounds__(float_threads)
    attention_float_forward(const AttentionFloatForward args) {
    using Tiles = FloatTiles<D, R>;
    GPT2FAST_SHARED(shared);
    float* const queries = reinterpret_cast<float*>(shared);
    float* const keys = queries + Tiles::row_floats;
    float* const values = keys + Tiles::column_floats;
    float* const weights = values + Tiles::column_floats;

    const AttentionShape& shape = args.shape;
    const BlockPlace block, keys_place = block.of_key_head(shape);
    const int head_row = block.row(shape);
    const int first_query = (int(gridDim.y) - 1 - block.tile) * Tiles::rows;
    const Place place = place_of_thread<R>();
    const uint8_t* mask =
        shape.visible == nullptr ? nullptr : shape.visible + int64_t(block.batch) * shape.time;
    const float scale = shape.scale * log2_e;
    const Dropout& dropout = shape.dropout;
    const uint64_t seed = dropout.threshold == 0 ? 0 : uint64_t(*dropout.seed);

    copy_floats<Tiles::rows, D>(queries, args.q, first_query, block, shape);
    cp_async_commit();

    float out[R][D / 8] = {}, exponent[R], sum[R] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) exponent[i] = no_exponent;
    const int tiles =
        (end_of_keys(shape, first_query + Tiles::rows) + float_columns - 1) / float_columns;
    // Of the first row; each of the others sees one key more.
    const int last_key = shape.causal ? first_query + place.row : shape.time;
    VisibleKeys<float_columns> visible{};
    int index = next_visible(mask, shape.time, 0, tiles, visible);
    while (index < tiles) {
        const int first_key = index * float_columns;
        __syncthreads();  // everybody is done with the keys and values before
        copy_floats<float_columns, D>(keys, args.k, first_key, keys_place, shape);
        copy_floats<float_columns, D>(values, args.v, first_key, keys_place, shape);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        float scores[R][4];
        multiply_rows<D, R>(scores, queries, keys, place);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int query = first_query + place.row + 8 * i;
            float largest = exponent[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = place.column + 8 * j;
                const bool hidden = first_key + column > last_key + 8 * i || !visible[column];
                scores[i][j] = hidden ? -INFINITY : scores[i][j] * scale;
                largest = fmaxf(largest, scores[i][j]);
            }
#pragma unroll
            for (int step = 1; step < 8; step *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
            }
            const float factor = exp2_approx(exponent[i] - largest);
            exponent[i] = largest;
            sum[i] *= factor;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) out[i][j] *= factor;
            RandomWords bits{};
            if (dropout.threshold != 0) {
                bits = dropout_words(seed, head_row, query, first_key + place.column);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float weight = exp2_approx(scores[i][j] - largest);
                sum[i] += weight;
                scores[i][j] = is_dropped(bits, place.column + 8 * j, dropout) ? 0.0f : weight;
            }
        }
        store_weights(weights, scores, place);
        __syncwarp();
        multiply_weights<D, R>(out, weights, values, place);
        __syncwarp();
        index = next_visible(mask, shape.time, index + 1, tiles, visible);
    }
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int step = 1; step < 8; step *= 2) {
            sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
        }
        const int query = first_query + place.row + 8 * i;
        if (place.column == 0 && query < shape.time) {
            args.lse[int64_t(head_row) * shape.time + query] =
                sum[i] == 0.0f ? INFINITY : exponent[i] * ln_2 + logf(sum[i]);
        }
        const float factor = sum[i] == 0.0f ? 0.0f : dropout.scale / sum[i];
#pragma unroll
        for (int j = 0; j < D / 8; ++j) out[i][j] *= factor;
    }
    store_sums<D, R>(out, args.out, first_query, block, shape, place);
}

// dQ of a tile of queries.
template <int D, int R>
__global__ void __launch_bounds__(float_threads)
    attention_float_backward_query(const AttentionFloatBackward args) {
    using Tiles = FloatTiles<D, R>;
    GPT2FAST_SHARED(shared);
    float* const queries = reinterpret_cast<float*>(shared);
    float* const grads = queries + Tiles::row_floats;
    float* const keys = grads + Tiles::row_floats;
    float* const values = keys + Tiles::column_floats;
    float* const weights = values + Tiles::column_floats;

    const AttentionShape& shape = args.shape;
    const BlockPlace block, keys_place = block.of_key_head(shape);
    const int head_row = block.row(shape);
    const int first_query = (int(gridDim.y) - 1 - block.tile) * Tiles::rows;
    const Place place = place_of_thread<R>();
    const uint8_t* mask =
        shape.visible == nullptr ? nullptr : shape.visible + int64_t(block.batch) * shape.time;
    const float scale = shape.scale * log2_e;
    const Dropout& dropout = shape.dropout;
    const uint64_t seed = dropout.threshold == 0 ? 0 : uint64_t(*dropout.seed);
    const float* statistics = args.statistics + int64_t(head_row) * padded_time(shape.time) * 2;

    copy_floats<Tiles::rows, D>(queries, args.q, first_query, block, shape);
    copy_floats<Tiles::rows, D>(grads, args.grad, first_query, block, shape);
    cp_async_commit();
    Vector<float, 2> both[R];  // log-sum in powers of two, delta
#pragma unroll
    for (int i = 0; i < R; ++i) {
        both[i] = load_vector<2>(statistics + (first_query + place.row + 8 * i) * 2);
    }

    float grad_q[R][D / 8] = {};
    const int tiles =
        (end_of_keys(shape, first_query + Tiles::rows) + float_columns - 1) / float_columns;
    // Of the first row; each of the others sees one key more.
    const int last_key = shape.causal ? first_query + place.row : shape.time;
    VisibleKeys<float_columns> visible{};
    int index = next_visible(mask, shape.time, 0, tiles, visible);
    while (index < tiles) {
        const int first_key = index * float_columns;
        __syncthreads();
        copy_floats<float_columns, D>(keys, args.k, first_key, keys_place, shape);
        copy_floats<float_columns, D>(values, args.v, first_key, keys_place, shape);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        float p[R][4], dp[R][4];
        multiply_rows<D, R>(p, queries, keys, place);
        multiply_rows<D, R>(dp, grads, values, place);
#pragma unroll
        for (int i = 0; i < R; ++i) {
            const int query = first_query + place.row + 8 * i;
            RandomWords bits{};
            if (dropout.threshold != 0) {
                bits = dropout_words(seed, head_row, query, first_key + place.column);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = place.column + 8 * j;
                const bool hidden = first_key + column > last_key + 8 * i || !visible[column];
                const float weight =
                    hidden ? 0.0f : exp2_approx(fmaf(p[i][j], scale, -both[i].v[0]));
                const float kept =
                    is_dropped(bits, column, dropout) ? 0.0f : dp[i][j] * dropout.scale;
                dp[i][j] = weight * (kept - both[i].v[1]);
            }
        }
        store_weights(weights, dp, place);
        __syncwarp();
        multiply_weights<D, R>(grad_q, weights, keys, place);
        __syncwarp();
        index = next_visible(mask, shape.time, index + 1, tiles, visible);
    }
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) grad_q[i][j] *= shape.scale;
    }
    store_sums<D, R>(grad_q, args.grad_q, first_query, block, shape, place);
}

// dK and dV of a tile of keys, from all heads of queries that read them.
template <int D, int R>
__global__ void __launch_bounds__(float_threads)
    attention_float_backward(const AttentionFloatBackward args) {
    using Tiles = FloatTiles<D, R>;
    GPT2FAST_SHARED(shared);
    float* const keys = reinterpret_cast<float*>(shared);
    float* const values = keys + Tiles::row_floats;
    float* const queries = values + Tiles::row_floats;
    float* const grads = queries + Tiles::column_floats;
    float* const weights = grads + Tiles::column_floats;
    float* const grad_scores = weights + Tiles::weight_floats;

    const AttentionShape& shape = args.shape;
    const BlockPlace block;
    const int first_key = block.tile * Tiles::rows;
    const Place place = place_of_thread<R>();
    const float scale = shape.scale * log2_e;
    const Dropout& dropout = shape.dropout;
    const uint64_t seed = dropout.threshold == 0 ? 0 : uint64_t(*dropout.seed);
    int first_seen[R];  // the first query that sees a key
#pragma unroll
    for (int i = 0; i < R; ++i) {
        const int key = first_key + place.row + 8 * i;
        const bool hidden = shape.visible != nullptr && key < shape.time &&
                            shape.visible[int64_t(block.batch) * shape.time + key] == 0;
        first_seen[i] = hidden ? shape.time : shape.causal ? key : 0;
    }

    copy_floats<Tiles::rows, D>(keys, args.k, first_key, block, shape);
    copy_floats<Tiles::rows, D>(values, args.v, first_key, block, shape);
    cp_async_commit();

    float grad_k[R][D / 8] = {}, grad_v[R][D / 8] = {};
    for (int member = 0; member < shape.group; ++member) {
        const BlockPlace queries_place = block.of_head(block.head * shape.group + member);
        const int head_row = queries_place.row(shape);
        const float* statistics = args.statistics + int64_t(head_row) * padded_time(shape.time) * 2;
        for (int first_query = shape.causal ? first_key : 0; first_query < shape.time;
             first_query += float_columns) {
            __syncthreads();
            copy_floats<float_columns, D>(queries, args.q, first_query, queries_place, shape);
            copy_floats<float_columns, D>(grads, args.grad, first_query, queries_place, shape);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();

            float p[R][4], dp[R][4];
            multiply_rows<D, R>(p, keys, queries, place);
            multiply_rows<D, R>(dp, values, grads, place);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int query = first_query + place.column + 8 * j;
                const auto both = load_vector<2>(statistics + query * 2);
                RandomWords bits{};
                if (dropout.threshold != 0) {
                    bits = dropout_words(seed, head_row, query, first_key + place.row);
                }
#pragma unroll
                for (int i = 0; i < R; ++i) {
                    const int key = first_key + place.row + 8 * i;
                    const float weight = query < first_seen[i]
                                             ? 0.0f
                                             : exp2_approx(fmaf(p[i][j], scale, -both.v[0]));
                    const bool drop = is_dropped(bits, key, dropout);
                    const float kept = drop ? 0.0f : dp[i][j] * dropout.scale;
                    dp[i][j] = weight * (kept - both.v[1]);
                    p[i][j] = drop ? 0.0f : weight * dropout.scale;
                }
            }
            store_weights(weights, p, place);
            store_weights(grad_scores, dp, place);
            __syncwarp();
            multiply_weights<D, R>(grad_v, weights, grads, place);
            multiply_weights<D, R>(grad_k, grad_scores, queries, place);
            __syncwarp();
        }
    }
    cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < D / 8; ++j) grad_k[i][j] *= shape.scale;
    }
    store_sums<D, R>(grad_k, args.grad_k, first_key, block, shape, place);
    store_sums<D, R>(grad_v, args.grad_v, first_key, block, shape, place);
}

}  // namespace gpt2fast::kernels
