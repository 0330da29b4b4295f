// Sum of a token and a position embedding, and the gradient of a table of embeddings.
//
// Bytes of an element in bfloat16: forward 4 read (two rows, of which the positions' come from the
// cache) and 2 written; backward 2 read, and the whole table written once. Memory is the floor.
// Not yet run on a GPU.
//
// Backward: the caller has sorted the indices, stably, so that what belongs to one row of the table
// is neighbors. A block takes `embedding_stretch` of them in order. A run of equal indices that
// ends within its stretch is finished; of one that crosses a border, the block leaves the sum of
// its part (the first in slot 0, the last in slot 1), and the second kernel adds these in order.
// No atomics, and a frequent token is summed by as many blocks as it fills.
#pragma once

#include "rows.cuh"

namespace gpt2fast::kernels {

constexpr int embedding_threads = 128;
constexpr int embedding_stretch = 32;

// A block a token: out[i] = wte[tokens[i]] + wpe[positions[i]]. An index outside of its table ends
// the kernel, as an assertion would.
template <typename T, int Vector>
__global__ void __launch_bounds__(embedding_threads)
    embedding_forward(const int64_t* __restrict__ tokens, const int64_t* __restrict__ positions,
                      const T* __restrict__ wte, const T* __restrict__ wpe, T* __restrict__ out,
                      int64_t wte_rows, int64_t wpe_rows, int columns) {
    const int64_t item = blockIdx.x;
    if (uint64_t(tokens[item]) >= uint64_t(wte_rows) ||
        uint64_t(positions[item]) >= uint64_t(wpe_rows)) {
        __trap();
    }
    const T* token = wte + tokens[item] * columns;
    const T* position = wpe + positions[item] * columns;
    for (int column = int(threadIdx.x) * Vector; column < columns;
         column += embedding_threads * Vector) {
        float sum[Vector], other[Vector];
        load_floats<Vector>(token + column, sum);
        load_floats<Vector>(position + column, other);
#pragma unroll
        for (int j = 0; j < Vector; ++j) sum[j] += other[j];
        store_floats<Vector>(out + item * columns + column, sum);
    }
}

// sorted[i]: the i-th smallest index; order[i]: which row of grad is its. grad_table holds zeros.
// partials: (blocks, 2, columns).
template <typename T, int Vector>
__global__ void __launch_bounds__(embedding_threads)
    embedding_backward(const T* __restrict__ grad, const int64_t* __restrict__ sorted,
                       const int64_t* __restrict__ order, T* __restrict__ grad_table,
                       float* __restrict__ partials, int64_t count, int columns,
                       int64_t grad_stride) {
    const int column = int(blockIdx.y * embedding_threads + threadIdx.x) * Vector;
    if (column >= columns) return;
    const int64_t begin = int64_t(blockIdx.x) * embedding_stretch;
    const int64_t end = begin + embedding_stretch < count ? begin + embedding_stretch : count;
    const bool from_before = begin > 0 && sorted[begin - 1] == sorted[begin];
    const bool goes_on = end < count && sorted[end] == sorted[end - 1];
    float* borders = partials + int64_t(blockIdx.x) * 2 * columns + column;
    float sum[Vector] = {};
    int64_t run = begin;
    for (int64_t i = begin; i < end; ++i) {
        float row[Vector];
        load_floats<Vector>(grad + order[i] * grad_stride + column, row);
#pragma unroll
        for (int j = 0; j < Vector; ++j) sum[j] += row[j];
        if (i + 1 < end && sorted[i + 1] == sorted[i]) continue;
        const bool first = run == begin && from_before;
        const bool last = i + 1 == end && goes_on;
        if (first) {
            store_floats<Vector>(borders, sum);
        } else if (last) {
            store_floats<Vector>(borders + columns, sum);
        } else {
            store_floats<Vector>(grad_table + sorted[i] * columns + column, sum);
        }
#pragma unroll
        for (int j = 0; j < Vector; ++j) sum[j] = 0.0f;
        run = i + 1;
    }
}

// Finishes the run, if any, that begins in stretch x and crosses its end.
template <typename T, int Vector>
__global__ void __launch_bounds__(embedding_threads)
    embedding_join(const int64_t* __restrict__ sorted, const float* __restrict__ partials,
                   T* __restrict__ grad_table, int64_t count, int columns) {
    const int column = int(blockIdx.y * embedding_threads + threadIdx.x) * Vector;
    const int64_t begin = int64_t(blockIdx.x) * embedding_stretch;
    const int64_t end = begin + embedding_stretch;
    if (column >= columns || end >= count || sorted[end] != sorted[end - 1]) return;
    const int64_t index = sorted[end];
    // A run that fills its whole stretch and comes from before is an earlier block's.
    if (begin > 0 && sorted[begin] == index && sorted[begin - 1] == index) return;
    float sum[Vector];
    load_floats<Vector>(partials + (int64_t(blockIdx.x) * 2 + 1) * columns + column, sum);
    for (int64_t next = end; next < count && sorted[next] == index; next += embedding_stretch) {
        float part[Vector];
        load_floats<Vector>(partials + next / embedding_stretch * 2 * columns + column, part);
#pragma unroll
        for (int j = 0; j < Vector; ++j) sum[j] += part[j];
    }
    store_floats<Vector>(grad_table + index * columns + column, sum);
}

}  // namespace gpt2fast::kernels
