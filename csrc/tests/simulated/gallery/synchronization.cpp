// Bugs between threads: barriers, warps, atomics.
#include "gallery.h"

namespace gpt2fast::simulated::synchronization {

using device::launch;
using device::named_barrier_arrive;
using device::named_barrier_sync;

constexpr int threads = 128;
using Kernel = void (*)(float*, const float*, bool);

// Runs kernel on one block of 128 threads and 0, 1, 2, ...
template <class Value>
void expect_values(Kernel kernel, bool planted, Value value) {
    const Buffer<float> x = counting<float>(threads);
    Buffer<float> y(threads);
    launch(kernel, dim3(1), dim3(threads), 2 * threads * sizeof(float), nullptr, y.data(), x.data(),
           planted);
    expect_equal(y, exactly(threads, value), "result");
}

// -------------------------------------------------------------------------------------- barriers

__global__ void reverse(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = x[threadIdx.x];
    if (!planted) __syncthreads();
    y[threadIdx.x] = row[threads - 1 - threadIdx.x];
}

BUG("no barrier between a write and the reads of others") {
    expect_values(reverse, planted, [](int64_t i) { return threads - 1 - i; });
}

__global__ void rotate_twice(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float next = row[(threadIdx.x + 1) % threads];
    if (!planted) __syncthreads();
    row[threadIdx.x] = next;
    __syncthreads();
    y[threadIdx.x] = row[(threadIdx.x + 1) % threads];
}

BUG("no barrier between reads and the next write") {
    expect_values(rotate_twice, planted, [](int64_t i) { return (i + 2) % threads; });
}

__global__ void clear_then_fill(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = 0;
    if (!planted) __syncthreads();
    if (threadIdx.x % 2 == 0) row[threads - 1 - threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = row[threadIdx.x];
}

BUG("no barrier between two writes to one place") {
    expect_values(clear_then_fill, planted,
                  [](int64_t i) { return i % 2 == 1 ? threads - 1 - i : 0; });
}

__global__ void barrier_of_one_warp(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = x[threadIdx.x];
    if (!planted || threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = row[threads - 1 - threadIdx.x];
}

BUG("__syncthreads in one warp only") {
    expect_values(barrier_of_one_warp, planted, [](int64_t i) { return threads - 1 - i; });
}

__global__ void barriers_in_branches(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    if (planted && threadIdx.x < 32) {
        row[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
    } else {
        row[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
    }
    y[threadIdx.x] = row[threads - 1 - threadIdx.x];
}

BUG("__syncthreads in both branches of a condition") {
    expect_values(barriers_in_branches, planted, [](int64_t i) { return threads - 1 - i; });
}

// The first two warps write what the last two read.
__device__ void produce_and_consume(float* y, const float* x, int arriving, int waiting_id,
                                    bool arrive) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    y[threadIdx.x] = 0;
    if (threadIdx.x < 64) {
        row[threadIdx.x] = x[threadIdx.x];
        if (arrive) named_barrier_arrive(1, arriving);
    } else {
        named_barrier_sync(waiting_id, arriving);
        y[threadIdx.x] = row[127 - threadIdx.x];
    }
}

__global__ void wrong_count(float* y, const float* x, bool planted) {
    produce_and_consume(y, x, planted ? 64 : 128, 1, true);
}
__global__ void wrong_id(float* y, const float* x, bool planted) {
    produce_and_consume(y, x, 128, planted ? 2 : 1, true);
}
__global__ void no_arrival(float* y, const float* x, bool planted) {
    produce_and_consume(y, x, 128, 1, !planted);
}

double consumed(int64_t i) { return i < 64 ? 0 : double(127 - i); }

BUG("named barrier that counts too few threads") { expect_values(wrong_count, planted, consumed); }
BUG("producers and consumers at different barriers") { expect_values(wrong_id, planted, consumed); }
BUG("producers that never arrive at the barrier") { expect_values(no_arrival, planted, consumed); }

// ----------------------------------------------------------------------------------------- warps

__global__ void reverse_in_warps(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = x[threadIdx.x];
    if (!planted) __syncwarp();
    y[threadIdx.x] = row[threadIdx.x ^ 31];
}

BUG("no __syncwarp between a lane's write and another's read") {
    expect_values(reverse_in_warps, planted, [](int64_t i) { return i ^ 31; });
}

__global__ void shuffle_in_a_branch(float* y, const float* x, bool planted) {
    float value = x[threadIdx.x];
    const bool lower = threadIdx.x % 32 < 16;
    if (lower || !planted) {
        const float other = __shfl_xor_sync(~0u, value, 1);
        if (lower) value = other;
    }
    value += __shfl_xor_sync(~0u, value, 2);
    y[threadIdx.x] = value;
}

BUG("shuffle of all lanes in a branch that half of them take") {
    expect_values(shuffle_in_a_branch, planted, [](int64_t i) {
        const auto value = [](int64_t lane) { return lane % 32 < 16 ? lane ^ 1 : lane; };
        return value(i) + value(i ^ 2);
    });
}

__global__ void shuffle_across_the_mask(float* y, const float* x, bool planted) {
    y[threadIdx.x] = 0;
    if (threadIdx.x % 32 < 16) {
        y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, x[threadIdx.x], planted ? 16 : 8);
    }
}

BUG("shuffle from a lane that does not take part") {
    expect_values(shuffle_across_the_mask, planted,
                  [](int64_t i) { return i % 32 < 16 ? i ^ 8 : 0; });
}

__global__ void shuffle_beside_the_mask(float* y, const float* x, bool planted) {
    y[threadIdx.x] = __shfl_sync(planted ? 0x7FFFFFFFu : ~0u, x[threadIdx.x], 0);
}

BUG("mask without the lane that calls") {
    expect_values(shuffle_beside_the_mask, planted, [](int64_t i) { return i / 32 * 32; });
}

__global__ void sum_after_exit(float* y, const float* x, bool planted) {
    const int rows = 100;
    if (planted && threadIdx.x >= rows) return;
    float sum = threadIdx.x < rows ? x[threadIdx.x] : 0.0f;
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    y[threadIdx.x] = sum;
}

BUG("lanes beyond the last row leave before the warp's sum") {
    expect_values(sum_after_exit, planted, [](int64_t i) {
        double sum = 0;
        for (int64_t j = i / 32 * 32; j < i / 32 * 32 + 32 && j < 100; ++j) sum += double(j);
        return sum;
    });
}

// --------------------------------------------------------------------------------------- atomics

__global__ void count_by_remainder(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    int* counts = reinterpret_cast<int*>(memory);
    if (threadIdx.x < 8) counts[threadIdx.x] = 0;
    __syncthreads();
    int* count = counts + int(x[threadIdx.x]) % 8;
    if (planted) {
        *count += 1;
    } else {
        atomicAdd(count, 1);
    }
    __syncthreads();
    y[threadIdx.x] = float(counts[threadIdx.x % 8]);
}

BUG("counter in shared memory without an atomic") {
    expect_values(count_by_remainder, planted, [](int64_t) { return threads / 8; });
}

__global__ void sum_of_blocks(float* y, const float* x, bool planted) {
    if (threadIdx.x != blockIdx.x) return;
    if (planted) {
        *y += x[blockIdx.x];
    } else {
        atomicAdd(y, x[blockIdx.x]);
    }
}

BUG("blocks that add to one place without an atomic") {
    const Buffer<float> x = counting<float>(8);
    Buffer<float> y(1, 0.0f);
    launch(sum_of_blocks, dim3(8), dim3(32), 0, nullptr, y.data(), x.data(), planted);
    expect_equal(y, {28}, "sum");
}

// The block that is last to leave its part adds them all.
__global__ void sum_by_the_last(float* y, float* parts, unsigned* tickets, bool planted) {
    GPT2FAST_SHARED(memory);
    bool* last = reinterpret_cast<bool*>(memory);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = float(blockIdx.x);
        if (!planted) __threadfence();
        *last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!*last || threadIdx.x != 0) return;
    __threadfence();
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += parts[i];
    *y = sum;
    atomicExch(tickets, 0u);
}

BUG("no __threadfence before the ticket of the last block") {
    Buffer<float> y(1), parts(8);
    Buffer<unsigned> tickets(1, 0u);
    launch(sum_by_the_last, dim3(8), dim3(32), 16, nullptr, y.data(), parts.data(), tickets.data(),
           planted);
    expect_equal(y, {28}, "sum");
}

}  // namespace gpt2fast::simulated::synchronization
