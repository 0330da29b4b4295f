// Small kernels through which Python sees what the simulated machine does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gpt2fast::simulated {

// The value that each lane of a warp gets; lanes outside the mask keep theirs. kind: index,
// up, down, xor.
std::vector<int> shuffle(const std::string& kind, const std::vector<int>& values, int argument,
                         int width, uint32_t mask);

// ballot, any and all of a warp, as lane 0 sees them.
std::vector<uint32_t> votes(const std::vector<int>& holds);

// The registers of ldmatrix when half i of shared memory is i and row r begins at half starts[r]:
// (lane, register).
std::vector<uint32_t> ldmatrix(const std::vector<int>& starts, int matrices, bool transposed);

// Copies of so many bytes, of which the valid ones are read: shared memory before the wait and
// after it.
std::vector<std::vector<uint32_t>> copy_async(const std::vector<uint32_t>& words, int bytes,
                                              const std::vector<bool>& valid);

// A box of a matrix of 16-bit numbers as it lies in shared memory.
std::vector<int> tma_box(const std::vector<int>& matrix, int rows, int columns, int row, int column,
                         int box_rows);

// The numbers that two halves of a block read of each other, through two named barriers.
std::vector<int> ping_pong(int rounds);

// Sum, maximum and number of distinct owners (by compare-and-swap) over several blocks.
std::vector<int> atomics(int blocks, int threads);

// The sum of 0 ... threads * blocks - 1 by the last block to finish, several times over.
std::vector<float> last_block_sums(int blocks, int threads, int times);

// In which order the blocks ran, and the threads of each.
std::vector<int> order_of_threads(int blocks, int threads);

// A misaligned cp_async in one thread of one block.
void fail_in_thread(int block, int thread);
int line_of_failure();

// Half of the threads reach another barrier than the other half; they wait for ever.
void deadlock();

// How many of so many OS threads got a right sum from launches at the same time.
int concurrent_sums(int os_threads, int launches);

// exp2_approx and tanh_approx.
std::vector<float> approximations(float x);

}  // namespace gpt2fast::simulated
