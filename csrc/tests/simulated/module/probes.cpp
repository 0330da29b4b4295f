#include "probes.h"

#include <atomic>
#include <thread>

#include "../testing.h"
#include "device/hopper.h"

namespace gpt2fast::simulated {
namespace {

using device::launch;
using device::shared_address;

constexpr unsigned all = ~0u;

template <class T>
Buffer<T> buffer_of(const std::vector<T>& values) {
    Buffer<T> buffer(int64_t(values.size()));
    for (size_t i = 0; i < values.size(); ++i) buffer[int64_t(i)] = values[i];
    return buffer;
}

template <class T>
std::vector<T> vector_of(const Buffer<T>& buffer) {
    return {buffer.data(), buffer.data() + buffer.size()};
}

enum class Kind { index, up, down, exclusive_or };

__global__ void shuffle_kernel(int* values, Kind kind, int argument, int width, uint32_t mask) {
    const int lane = int(threadIdx.x), value = values[lane];
    if ((mask >> lane & 1) == 0) return;
    int result = 0;
    switch (kind) {
        case Kind::index: result = __shfl_sync(mask, value, argument, width); break;
        case Kind::up: result = __shfl_up_sync(mask, value, unsigned(argument), width); break;
        case Kind::down: result = __shfl_down_sync(mask, value, unsigned(argument), width); break;
        case Kind::exclusive_or: result = __shfl_xor_sync(mask, value, argument, width); break;
    }
    values[lane] = result;
}

__global__ void votes_kernel(uint32_t* results, const int* holds) {
    const int mine = holds[threadIdx.x];
    const uint32_t ballot = __ballot_sync(all, mine);
    const int any = __any_sync(all, mine), every = __all_sync(all, mine);
    if (threadIdx.x != 0) return;
    results[0] = ballot;
    results[1] = uint32_t(any);
    results[2] = uint32_t(every);
}

template <int Matrices, bool Transposed>
__global__ void ldmatrix_kernel(uint32_t* registers, const int* starts, int halves) {
    GPT2FAST_SHARED(memory);
    const int lane = int(threadIdx.x);
    for (int i = lane; i < halves; i += 32) {
        reinterpret_cast<uint16_t*>(memory)[i] = uint16_t(i);
    }
    __syncwarp();
    const uint32_t address = shared_address(memory) + uint32_t(starts[lane % (8 * Matrices)]) * 2;
    uint32_t r[Matrices];
    if constexpr (Matrices == 4) {
        Transposed ? device::ldmatrix_x4_trans(r, address) : device::ldmatrix_x4(r, address);
    } else {
        Transposed ? device::ldmatrix_x2_trans(r, address) : device::ldmatrix_x2(r, address);
    }
    for (int i = 0; i < Matrices; ++i) registers[lane * Matrices + i] = r[i];
}

template <int Bytes>
__global__ void copy_async_kernel(uint32_t* before, uint32_t* after, const uint32_t* words,
                                  const int* valid, int copies) {
    GPT2FAST_SHARED(memory);
    const uint32_t* copied = reinterpret_cast<const uint32_t*>(memory);
    for (int i = 0; i < copies; ++i) {
        device::cp_async<Bytes>(shared_address(memory) + uint32_t(i) * Bytes, words + i * Bytes / 4,
                                valid[i] != 0);
    }
    device::cp_async_commit();
    for (int i = 0; i < copies * Bytes / 4; ++i) before[i] = copied[i];
    device::cp_async_wait<0>();
    for (int i = 0; i < copies * Bytes / 4; ++i) after[i] = copied[i];
}

__global__ void tma_kernel(uint16_t* halves, const __grid_constant__ device::TensorMap map,
                           int bytes, int column, int row) {
    GPT2FAST_SHARED(memory);
    const uint32_t box = shared_address(memory), bar = box + uint32_t(bytes);
    device::mbarrier_init(bar, 1);
    device::mbarrier_init_fence();
    device::mbarrier_arrive_expect(bar, bytes);
    device::tma_load(box, map, bar, column, row);
    device::mbarrier_wait(bar, 0);
    memcpy(halves, memory, size_t(bytes));
}

// Two warps take turns: the second doubles what the first wrote, the first adds one.
__global__ void ping_pong_kernel(int* results, int rounds) {
    GPT2FAST_SHARED(memory);
    int* numbers = reinterpret_cast<int*>(memory);
    const int lane = int(threadIdx.x) % 32;
    const bool first = threadIdx.x < 32;
    if (first) numbers[lane] = lane;
    for (int i = 0; i < rounds; ++i) {
        if (first) {
            device::named_barrier_arrive(1, 64);
            device::named_barrier_sync(2, 64);
            const int increased = numbers[31 - lane] + 1;
            __syncwarp();
            numbers[lane] = increased;
        } else {
            device::named_barrier_sync(1, 64);
            const int doubled = 2 * numbers[31 - lane];
            __syncwarp();
            numbers[lane] = doubled;
            device::named_barrier_arrive(2, 64);
        }
        __syncthreads();
    }
    if (first) results[lane] = numbers[lane];
}

__global__ void atomics_kernel(int* results, int* owners) {
    const int rank = int(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(&results[0], rank);
    atomicMax(&results[1], rank);
    if (atomicCAS(&owners[threadIdx.x], -1, rank) == -1) atomicAdd(&results[2], 1);
}

__global__ void last_block_kernel(float* sum, float* parts, unsigned* tickets) {
    GPT2FAST_SHARED(memory);
    int* last = reinterpret_cast<int*>(memory);
    float part = float(blockIdx.x * blockDim.x + threadIdx.x);
    for (int mask = 16; mask > 0; mask /= 2) part += __shfl_xor_sync(all, part, mask);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = part;
        __threadfence();
        *last = atomicAdd(tickets, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (*last == 0 || threadIdx.x != 0) return;
    __threadfence();
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
    *sum = total;
    atomicExch(tickets, 0u);
}

__global__ void order_kernel(int* order, int* count) {
    order[atomicAdd(count, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

constexpr int failing_line = __LINE__ + 5;
__global__ void failing_kernel(int block, int thread) {
    GPT2FAST_SHARED(memory);
    const uint32_t address = shared_address(memory) + threadIdx.x * 16;
    const bool here = int(blockIdx.x) == block && int(threadIdx.x) == thread;
    device::cp_async<16>(address + (here ? 4 : 0), memory, false);
}

__global__ void deadlock_kernel() { device::named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64); }

__global__ void sum_kernel(int* sum) {
    GPT2FAST_SHARED(memory);
    int* numbers = reinterpret_cast<int*>(memory);
    numbers[threadIdx.x] = int(threadIdx.x);
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) numbers[threadIdx.x] += numbers[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *sum = numbers[0];
}

__global__ void approximations_kernel(float* results, float x) {
    results[0] = device::exp2_approx(x);
    results[1] = device::tanh_approx(x);
}

}  // namespace

std::vector<int> shuffle(const std::string& kind, const std::vector<int>& values, int argument,
                         int width, uint32_t mask) {
    const Kind which = kind == "index"  ? Kind::index
                       : kind == "up"   ? Kind::up
                       : kind == "down" ? Kind::down
                                        : Kind::exclusive_or;
    Buffer<int> results = buffer_of(values);
    launch(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, results.data(), which, argument, width,
           mask);
    return vector_of(results);
}

std::vector<uint32_t> votes(const std::vector<int>& holds) {
    Buffer<uint32_t> results(3);
    const Buffer<int> buffer = buffer_of(holds);
    launch(votes_kernel, dim3(1), dim3(32), 0, nullptr, results.data(), buffer.data());
    return vector_of(results);
}

std::vector<uint32_t> ldmatrix(const std::vector<int>& starts, int matrices, bool transposed) {
    Buffer<uint32_t> registers(32 * matrices);
    const Buffer<int> buffer = buffer_of(starts);
    int halves = 0;
    for (int start : starts) halves = std::max(halves, start + 8);
    const auto kernel = matrices == 4
                            ? (transposed ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>)
                            : (transposed ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>);
    launch(kernel, dim3(1), dim3(32), size_t(halves) * 2, nullptr, registers.data(), buffer.data(),
           halves);
    return vector_of(registers);
}

std::vector<std::vector<uint32_t>> copy_async(const std::vector<uint32_t>& words, int bytes,
                                              const std::vector<bool>& valid) {
    // Aligned as device memory is.
    std::vector<device::Vector<uint32_t, 4>> source((words.size() + 3) / 4);
    std::memcpy(source.data(), words.data(), words.size() * sizeof(uint32_t));
    Buffer<uint32_t> before(int64_t(words.size())), after(int64_t(words.size()));
    Buffer<int> flags(int64_t(valid.size()));
    for (size_t i = 0; i < valid.size(); ++i) flags[int64_t(i)] = valid[i];
    const auto kernel = bytes == 4   ? copy_async_kernel<4>
                        : bytes == 8 ? copy_async_kernel<8>
                                     : copy_async_kernel<16>;
    launch(kernel, dim3(1), dim3(1), words.size() * sizeof(uint32_t), nullptr, before.data(),
           after.data(), source.data()->v, flags.data(), int(valid.size()));
    return {vector_of(before), vector_of(after)};
}

std::vector<int> tma_box(const std::vector<int>& matrix, int rows, int columns, int row, int column,
                         int box_rows) {
    std::vector<device::Vector<uint16_t, 8>> source((matrix.size() + 7) / 8);
    for (size_t i = 0; i < matrix.size(); ++i) source[i / 8].v[i % 8] = uint16_t(matrix[i]);
    Buffer<uint16_t> halves(box_rows * 64);
    const int bytes = box_rows * 128;
    launch(tma_kernel, dim3(1), dim3(1), size_t(bytes) + 8, nullptr, halves.data(),
           device::tensor_map<device::bf16>(source.data(), rows, columns, columns * 2, box_rows),
           bytes, column, row);
    return {halves.data(), halves.data() + halves.size()};
}

std::vector<int> ping_pong(int rounds) {
    Buffer<int> results(32);
    launch(ping_pong_kernel, dim3(1), dim3(64), 32 * sizeof(int), nullptr, results.data(), rounds);
    return vector_of(results);
}

std::vector<int> atomics(int blocks, int threads) {
    Buffer<int> results(3, 0), owners(threads, -1);
    launch(atomics_kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, nullptr,
           results.data(), owners.data());
    return vector_of(results);
}

std::vector<float> last_block_sums(int blocks, int threads, int times) {
    Buffer<float> sums(times), parts(blocks);
    Buffer<unsigned> tickets(1, 0u);
    for (int i = 0; i < times; ++i) {
        launch(last_block_kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), 16, nullptr,
               &sums[i], parts.data(), tickets.data());
    }
    return vector_of(sums);
}

std::vector<int> order_of_threads(int blocks, int threads) {
    Buffer<int> order(blocks * threads), count(1, 0);
    launch(order_kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, nullptr, order.data(),
           count.data());
    return vector_of(order);
}

void fail_in_thread(int block, int thread) {
    launch(failing_kernel, dim3(4), dim3(64), 64 * 16, nullptr, block, thread);
}

int line_of_failure() { return failing_line; }

void deadlock() { launch(deadlock_kernel, dim3(1), dim3(64), 0, nullptr); }

int concurrent_sums(int os_threads, int launches) {
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < os_threads; ++i) {
        threads.emplace_back([&] {
            int good = 0;
            for (int j = 0; j < launches; ++j) {
                Buffer<int> sum(1);
                launch(sum_kernel, dim3(1), dim3(128), 128 * sizeof(int), nullptr, sum.data());
                good += sum[0] == 127 * 64;
            }
            right += good == launches;
        });
    }
    for (std::thread& thread : threads) thread.join();
    return right;
}

std::vector<float> approximations(float x) {
    Buffer<float> results(2);
    launch(approximations_kernel, dim3(1), dim3(1), 0, nullptr, results.data(), x);
    return vector_of(results);
}

}  // namespace gpt2fast::simulated
