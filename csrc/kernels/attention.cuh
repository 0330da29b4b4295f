// Arguments that all kernels of attention share, and which tile a block takes.
#pragma once

#include "../common/shapes.h"
#include "philox.cuh"

namespace gpt2fast::kernels {

using namespace device;

constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.693147180559945309f;

// Shared memory of a block on the GPUs that have the least, sm_86 and sm_89.
constexpr int shared_memory_limit = 99 * 1024;

struct AttentionShape {
    int time, heads, head_dim;
    int group;    // heads of queries that read one head of keys
    bool causal;  // queries see no key after their own position
    float scale;
    const uint8_t* visible;  // (batch, time), 0 for keys that nobody sees; may be null
    Dropout dropout;
};

// The tile that a block works on. Grids are (heads, tiles, batch): the tiles of one row of the
// batch, whose keys and values are read together, follow each other, the largest of all heads
// first. The heads are those of the queries, or of the keys where a block takes a tile of keys.
struct BlockPlace {
    int batch, head, tile;

    __device__ __forceinline__ BlockPlace()
        : batch(blockIdx.z), head(blockIdx.x), tile(blockIdx.y) {}

    // The same tile of another head.
    __device__ __forceinline__ BlockPlace of_head(int other) const {
        BlockPlace place = *this;
        place.head = other;
        return place;
    }
    __device__ __forceinline__ BlockPlace of_key_head(const AttentionShape& shape) const {
        return of_head(head / shape.group);
    }
    // Among all rows' heads of queries.
    __device__ __forceinline__ int row(const AttentionShape& shape) const {
        return batch * shape.heads + head;
    }
};

// The rows of the place's head from position `first` on.
template <typename T>
__device__ __forceinline__ T* rows_of(const Heads<T>& heads, const BlockPlace& place, int first) {
    return heads.data + place.batch * heads.row_stride + place.head * heads.head_stride +
           first * heads.entry_stride;
}

// The keys before this one are all that queries before `end_query` see.
__device__ __forceinline__ int end_of_keys(const AttentionShape& shape, int end_query) {
    return shape.causal ? min(end_query, shape.time) : shape.time;
}

// The backward pass reads two floats of every query: the log-sum in powers of two, and delta, the
// sum of the products of result and gradient. Past the end they are infinity and 0, which makes
// weights vanish. (batch, heads, padded time, 2), padded to a multiple of every tile of queries.
constexpr int statistics_rows = 64;

// Rows are counted in 32 bits.
__host__ __device__ constexpr int padded_time(int time) {
    return (time + statistics_rows - 1) / statistics_rows * statistics_rows;
}

// Which of a tile's keys are visible, a bit each.
template <int Keys>
struct VisibleKeys {
    uint32_t words[Keys / 32];

    __device__ __forceinline__ bool operator[](int key) const {
        return words[key / 32] >> (key % 32) & 1;
    }
};

// The first tile from `tile` on, below `tiles`, that holds a visible key, or `tiles`. Without a
// mask that is `tile`, and visible are all keys that exist. All threads of a warp call it together
// and find the same.
template <int Keys>
__device__ __forceinline__ int next_visible(const uint8_t* visible, int time, int tile, int tiles,
                                            VisibleKeys<Keys>& keys) {
    const int lane = threadIdx.x % 32;
    if (visible == nullptr) {
#pragma unroll
        for (int word = 0; word < Keys / 32; ++word) {
            const int left = time - tile * Keys - word * 32;
            keys.words[word] = left >= 32 ? 0xffffffffu : (1u << max(left, 0)) - 1;
        }
        return tile;
    }
    for (; tile < tiles; ++tile) {
        uint32_t any = 0;
#pragma unroll
        for (int word = 0; word < Keys / 32; ++word) {
            const int key = tile * Keys + word * 32 + lane;
            const bool seen = key < time && visible[key] != 0;
            keys.words[word] = __ballot_sync(0xffffffffu, seen);
            any |= keys.words[word];
        }
        if (any != 0) break;
    }
    return tile;
}

}  // namespace gpt2fast::kernels
