// Writing, reordering and releasing the rows of a key-value cache.
//
// Appending reads and writes each new key and value once, in bfloat16 4 bytes each way an element
// of the width (124M, one token of one row: 6 KiB a layer); reordering moves all T_max entries of
// every row that changes, 3 MiB each way a row and layer of 124M. Nothing is computed: memory is
// the floor. Not yet run on a GPU.
//
// An int8 cache has a float32 factor for each head's entry, whose largest element is stored as 127:
// 68 bytes a head of 64, where bfloat16 takes 128. Appending to one reads 2 bytes an element (a
// second time from the L1) and writes 1.06. How it rounds is what csrc/cpu/decode.h does and
// gpt2fast/ops/int8_cache.py defines. An element that is NaN makes the factor NaN.
//
// Reordering in place: a thread owns the same few bytes of all rows, and has read all that it needs
// of them into shared memory before it writes the first, so that rows may repeat and swap freely
// and no thread waits for another.
// Rows and entries outside of the cache end a kernel, as an assertion would.
#pragma once

#include "../common/shapes.h"
#include "rows.cuh"

namespace gpt2fast::kernels {

template <typename From, typename To>
struct NewEntries {
    Heads<const From> from[2];  // keys and values
    Heads<To> cache[2];
    Integers lengths;
    Integers counts;  // data null: all are stored
    int time, heads, head_dim, entries;
    unsigned pieces;  // vectors of k, as many as of v
};

constexpr int append_threads = 256;
constexpr int reorder_threads = 256;  // at most

// A thread a vector, block row y: keys or values.
template <typename From, typename To, int Vector>
__global__ void __launch_bounds__(append_threads) append_to_cache(const NewEntries<From, To> args) {
    unsigned i = blockIdx.x * append_threads + threadIdx.x;
    if (i >= args.pieces) return;
    const unsigned vectors = unsigned(args.head_dim) / Vector;
    const int64_t column = int64_t(i % vectors) * Vector;
    i /= vectors;
    const int64_t head = i % unsigned(args.heads);
    i /= unsigned(args.heads);
    const int64_t step = i % unsigned(args.time), row = i / unsigned(args.time);
    if (args.counts.data != nullptr && step >= args.counts[row]) return;
    const int64_t entry = args.lengths[row] + step;
    if (entry < 0 || entry >= args.entries) __trap();
    float values[Vector];
    load_floats<Vector>(args.from[blockIdx.y].at(row, step, head) + column, values);
    store_floats<Vector>(args.cache[blockIdx.y].at(row, entry, head) + column, values);
}

template <typename From>
struct NewInt8Entries {
    NewEntries<From, int8_t> entries;  // a piece is a head's entry
    Heads<float> scales[2];            // (rows, entries, heads)
};

// The larger of two; NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// `Lanes` lanes a head's entry, block row y: keys or values.
template <typename From, int Vector, int Lanes>
__global__ void __launch_bounds__(append_threads)
    append_to_int8_cache(const NewInt8Entries<From> args) {
    const NewEntries<From, int8_t>& entries = args.entries;
    const unsigned piece = blockIdx.x * (append_threads / Lanes) + threadIdx.x / Lanes;
    const int first = int(threadIdx.x % Lanes) * Vector;
    const int64_t head = piece % unsigned(entries.heads);
    const int64_t step = piece / unsigned(entries.heads) % unsigned(entries.time);
    const int64_t row = piece / unsigned(entries.heads) / unsigned(entries.time);
    // Lanes that have nothing to store stay for the shuffles.
    bool stored = piece < entries.pieces;
    if (stored && entries.counts.data != nullptr) stored = step < entries.counts[row];
    const int64_t entry = stored ? entries.lengths[row] + step : 0;
    if (entry < 0 || entry >= entries.entries) __trap();
    const From* from = entries.from[blockIdx.y].at(row, step, head);
    float values[Vector];
    float largest = 0.0f;
    for (int c = first; stored && c < entries.head_dim; c += Lanes * Vector) {
        load_floats<Vector>(from + c, values);
#pragma unroll
        for (int i = 0; i < Vector; ++i) largest = larger(largest, fabsf(values[i]));
    }
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
        largest = larger(largest, __shfl_xor_sync(all_lanes, largest, distance));
    }
    if (!stored) return;
    // An entry of zeros has the factor 0.
    const float inverse = 127.0f / fmaxf(largest, 1e-30f);
    int8_t* to = entries.cache[blockIdx.y].at(row, entry, head);
    for (int c = first; c < entries.head_dim; c += Lanes * Vector) {
        load_floats<Vector>(from + c, values);
        device::Vector<int8_t, Vector> rounded;
#pragma unroll
        for (int i = 0; i < Vector; ++i) {
            rounded.v[i] = int8_t(fminf(fmaxf(rintf(values[i] * inverse), -127.0f), 127.0f));
        }
        store_vector(to + c, rounded);
    }
    if (first == 0) *args.scales[blockIdx.y].at(row, entry, head) = largest / 127.0f;
}

template <typename T>
struct Reordered {
    Heads<T> cache[2];
    Integers rows;
    int count;  // of rows that are replaced
    int heads, words, all_rows;
    unsigned pieces;  // vectors in a row of the cache
};

// A thread a vector of all rows, block row y: keys or values. Shared: count vectors a thread.
template <typename T, int Vector>
__global__ void __launch_bounds__(reorder_threads) reorder_cache(const Reordered<T> args) {
    GPT2FAST_SHARED(memory);
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.pieces) return;
    using Piece = device::Vector<T, Vector>;
    Piece* pieces = reinterpret_cast<Piece*>(memory) + threadIdx.x;
    const unsigned vectors = unsigned(args.words) / Vector;
    const int64_t column = int64_t(i % vectors) * Vector;
    i /= vectors;
    const Heads<T> cache = blockIdx.y == 0 ? args.cache[0] : args.cache[1];
    T* mine = cache.at(0, i / unsigned(args.heads), i % unsigned(args.heads)) + column;
    for (int row = 0; row < args.count; ++row) {
        const int64_t from = args.rows[row];
        if (from < 0 || from >= args.all_rows) __trap();
        if (from != row) {
            pieces[row * blockDim.x] = load_vector<Vector>(mine + from * cache.row_stride);
        }
    }
    for (int row = 0; row < args.count; ++row) {
        if (args.rows[row] != row) {
            store_vector(mine + row * cache.row_stride, pieces[row * blockDim.x]);
        }
    }
}

// A thread a length: zero if any of the rows names it.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    release_rows(int64_t* lengths, int64_t stride, int64_t count, Integers rows, int64_t released) {
    const int64_t row = int64_t(blockIdx.x) * Threads + threadIdx.x;
    if (row >= count) return;
    for (int64_t i = 0; i < released; ++i) {
        if (rows[i] < 0 || rows[i] >= count) __trap();
        if (rows[i] == row) lengths[row * stride] = 0;
    }
}

}  // namespace gpt2fast::kernels
