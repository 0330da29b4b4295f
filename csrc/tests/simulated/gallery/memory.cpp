// Bugs in addresses, sizes, initial values and integer arithmetic.
#include "gallery.h"

namespace gpt2fast::simulated::memory {

using device::launch;
using device::load_vector;
using device::Vector;

__global__ void differences(float* y, const float* x, int n, bool planted) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[i] = i + 1 < n || planted ? x[i + 1] - x[i] : 0.0f;
    }
}

BUG("load past the end by one element") {
    const int n = 100;
    const Buffer<float> x = counting<float>(n);
    Buffer<float> y(n);
    launch(differences, dim3(1), dim3(32), 0, nullptr, y.data(), x.data(), n, planted);
    y[n - 1] = 0;
    expect_equal(y, exactly(n, [&](int64_t i) { return i + 1 < n; }), "differences");
}

__global__ void copy(float* y, const float* x, int n, bool planted) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n || planted) y[i] = x[i];
}

BUG("tail of the last block not predicated") {
    const int n = 100;
    const Buffer<float> x = counting<float>(n);
    Buffer<float> y(n);
    launch(copy, dim3(4), dim3(32), 0, nullptr, y.data(), x.data(), n, planted);
    expect_equal(y, exactly(n, [](int64_t i) { return i; }), "copy");
}

BUG("grid rounded down: the last rows are not computed") {
    const int n = 100;
    const Buffer<float> x = counting<float>(n);
    Buffer<float> y(n);
    launch(copy, dim3(planted ? n / 32 : (n + 31) / 32), dim3(32), 0, nullptr, y.data(), x.data(),
           n, false);
    expect_equal(y, exactly(n, [](int64_t i) { return i; }), "copy");
}

__global__ void row_maxima(float* y, const float* x) {
    y[blockIdx.y] = fmaxf(x[2 * blockIdx.y], x[2 * blockIdx.y + 1]);
}

__global__ void row_maxima_in_x(float* y, const float* x) {
    y[blockIdx.x] = fmaxf(x[2 * blockIdx.x], x[2 * blockIdx.x + 1]);
}

BUG("more than 65,535 rows in grid.y") {
    const unsigned rows = planted ? 65536 : 100;
    const Buffer<float> x = counting<float>(2 * rows);
    Buffer<float> y(rows);
    launch(planted ? row_maxima : row_maxima_in_x, planted ? dim3(1, rows) : dim3(rows), dim3(1), 0,
           nullptr, y.data(), x.data());
    expect_equal(y, exactly(rows, [](int64_t i) { return 2 * i + 1; }), "maxima");
}

// Reverses 64 numbers in shared memory.
__global__ void reverse(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    row[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = row[(planted ? 64 : 63) - threadIdx.x];
}

__global__ void reverse_with_padding(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* row = reinterpret_cast<float*>(memory);
    const auto padded = [&](unsigned i) { return planted ? i + i / 32 : i; };
    row[padded(threadIdx.x)] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = row[padded(63 - threadIdx.x)];
}

std::vector<double> reversed() {
    return exactly(64, [](int64_t i) { return 63 - i; });
}

BUG("read past the end of shared memory") {
    const Buffer<float> x = counting<float>(64);
    Buffer<float> y(64);
    launch(reverse, dim3(1), dim3(64), 64 * sizeof(float), nullptr, y.data(), x.data(), planted);
    expect_equal(y, reversed(), "reverse");
}

BUG("too little shared memory for the padding of its rows") {
    const Buffer<float> x = counting<float>(64);
    Buffer<float> y(64);
    launch(reverse_with_padding, dim3(1), dim3(64), 64 * sizeof(float), nullptr, y.data(), x.data(),
           planted);
    expect_equal(y, reversed(), "reverse");
}

// Each warp leaves its sum, the first thread adds eight of them.
__global__ void sum_of_warps(float* y, const float* x, bool planted) {
    GPT2FAST_SHARED(memory);
    float* sums = reinterpret_cast<float*>(memory);
    float sum = x[threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (threadIdx.x < 8 && !planted) sums[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int i = 0; i < 8; ++i) total += sums[i];
        *y = total;
    }
}

BUG("shared memory read before anybody wrote it") {
    const Buffer<float> x(64, 1.0f);
    Buffer<float> y(1);
    launch(sum_of_warps, dim3(1), dim3(64), 8 * sizeof(float), nullptr, y.data(), x.data(),
           planted);
    expect_equal(y, {64}, "sum");
}

__global__ void copy_vectors(float* y, const float* x, int columns) {
    const float* row = x + blockIdx.x * columns;
    const int i = 4 * int(threadIdx.x);
    if (i + 4 > columns) return;
    const Vector<float, 4> v = load_vector<4>(row + i);
    for (int j = 0; j < 4; ++j) y[blockIdx.x * columns + i + j] = v.v[j];
}

BUG("vector load from rows of odd length") {
    const int columns = planted ? 31 : 32;
    const Buffer<float> x = counting<float>(2 * columns);
    Buffer<float> y(2 * columns);
    launch(copy_vectors, dim3(2), dim3(32), 0, nullptr, y.data(), x.data(), columns);
    expect_equal(y, exactly(2 * columns, [](int64_t i) { return i; }), "copy");
}

__global__ void offsets(int64_t* y, int row, int stride, bool planted) {
    y[threadIdx.x] = planted ? int64_t((row + int(threadIdx.x)) * stride)
                             : int64_t(row + int(threadIdx.x)) * stride;
}

BUG("offset of a row in 32 bits") {
    Buffer<int64_t> y(32);
    launch(offsets, dim3(1), dim3(32), 0, nullptr, y.data(), 70000, 50257, planted);
    expect_equal(y, exactly(32, [](int64_t i) { return (70000 + i) * 50257; }), "offsets");
}

__global__ void masks(unsigned* y, bool planted) {
    const unsigned count = threadIdx.x + 1;
    y[threadIdx.x] = count == 32 && !planted ? ~0u : (1u << count) - 1;
}

BUG("shift by the width of the type") {
    Buffer<unsigned> y(32);
    launch(masks, dim3(1), dim3(32), 0, nullptr, y.data(), planted);
    expect_equal(y, exactly(32, [](int64_t i) { return (uint64_t(2) << i) - 1; }), "masks");
}

// Philox4x32-10 (Salmon et al., 2011), the first word.
__device__ unsigned philox(unsigned c0, unsigned c1, unsigned key) {
    unsigned c[4] = {c0, c1, 0, 0}, k[2] = {key, 0};
    for (int round = 0; round < 10; ++round) {
        const unsigned high[2] = {__umulhi(0xD2511F53u, c[0]), __umulhi(0xCD9E8D57u, c[2])};
        const unsigned low[2] = {0xD2511F53u * c[0], 0xCD9E8D57u * c[2]};
        c[0] = high[1] ^ c[1] ^ k[0];
        c[1] = low[1];
        c[2] = high[0] ^ c[3] ^ k[1];
        c[3] = low[0];
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return c[0];
}

__global__ void dropped(float* y, int columns, int first_row) {
    const unsigned row = blockIdx.x + first_row;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        y[blockIdx.x * columns + i] = float(philox(i, row, 7) >> 31);
    }
}

BUG("Philox counter of the backward pass off by one row") {
    const int rows = 4, columns = 64;
    Buffer<float> forward(rows * columns), backward(rows * columns);
    launch(dropped, dim3(rows), dim3(32), 0, nullptr, forward.data(), columns, 0);
    launch(dropped, dim3(rows), dim3(32), 0, nullptr, backward.data(), columns, int(planted));
    expect_equal(backward, exactly(rows * columns, [&](int64_t i) { return forward[i]; }), "mask");
}

}  // namespace gpt2fast::simulated::memory
