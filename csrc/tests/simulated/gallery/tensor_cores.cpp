// Bugs around cp.async, ldmatrix and mma, in one product of two matrices.
#include "gallery.h"

namespace gpt2fast::simulated::tensor_cores {

using namespace device;

enum class Plant {
    none,
    wait_for_too_few,
    no_commit,
    no_barrier_after_wait,
    no_barrier_before_refill,
    one_tile_too_many,
    not_predicated,
    swizzle_forgotten,
    no_swizzle_at_all,
    registers_swapped,
    not_transposed,
    half_a_chunk,
    rows_beyond_the_tile,
    mma_in_a_branch,
};

// C (32 x 64) = A (32 x K) B (K x 64), K a multiple of 8: two warps of 16 rows each, two stages of
// 64 k. Rows of 128 bytes, their 16-byte chunks swizzled.
constexpr int rows = 32, columns = 64, depth = 64;
constexpr uint32_t row_bytes = 128, stage_bytes = (rows + depth) * row_bytes;

__device__ uint32_t chunk_at(uint32_t tile, int row, int chunk, bool swizzled) {
    return tile + uint32_t(row) * row_bytes + uint32_t(swizzled ? chunk ^ (row & 7) : chunk) * 16;
}

__device__ void load_stage(uint32_t stage, const bf16* a, const bf16* b, int k0, int k_count,
                           Plant plant) {
    const bool swizzled = plant != Plant::no_swizzle_at_all;
    const bool predicated = plant != Plant::not_predicated;
    for (int i = int(threadIdx.x); i < (rows + depth) * 8; i += int(blockDim.x)) {
        const int row = i / 8, chunk = i % 8;
        const bool of_a = row < rows;
        const int k = of_a ? k0 + chunk * 8 : k0 + row - rows;
        const bool valid = k < k_count || !predicated;
        const bf16* from = of_a ? a + row * k_count + k : b + k * columns + chunk * 8;
        cp_async<16>(chunk_at(stage, row, chunk, swizzled), valid ? from : a, valid);
    }
}

__global__ void product(float* c, const bf16* a, const bf16* b, int k_count, Plant plant) {
    GPT2FAST_SHARED(memory);
    const uint32_t stages = shared_address(memory);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int tiles = (k_count + depth - 1) / depth;
    const bool swizzled = plant != Plant::swizzle_forgotten && plant != Plant::no_swizzle_at_all;
    float sums[8][4] = {};

    load_stage(stages, a, b, 0, k_count, plant);
    cp_async_commit();
    for (int j = 0; j < tiles; ++j) {
        const uint32_t stage = stages + uint32_t(j % 2) * stage_bytes;
        const uint32_t next = stages + uint32_t((j + 1) % 2) * stage_bytes;
        if (j + 1 < tiles || plant == Plant::one_tile_too_many) {
            load_stage(next, a, b, (j + 1) % tiles * depth, k_count, plant);
        }
        if (plant != Plant::no_commit) cp_async_commit();
        if (plant == Plant::wait_for_too_few) {
            cp_async_wait<2>();
        } else {
            cp_async_wait<1>();
        }
        if (plant != Plant::no_barrier_after_wait) __syncthreads();
        for (int k = 0; k < depth / 16; ++k) {
            uint32_t a_registers[4];
            const int a_row = warp * 16 + lane % 16;
            const uint32_t half_a_chunk = plant == Plant::half_a_chunk ? 8 : 0;
            ldmatrix_x4(a_registers,
                        chunk_at(stage, a_row, k * 2 + lane / 16, swizzled) + half_a_chunk);
            if (plant == Plant::registers_swapped) std::swap(a_registers[1], a_registers[2]);
            for (int n = 0; n < columns / 16; ++n) {
                uint32_t b_registers[4];
                const int b_row =
                    rows + k * 16 + lane % 16 + (plant == Plant::rows_beyond_the_tile ? 16 : 0);
                const uint32_t address = chunk_at(stage, b_row, n * 2 + lane / 16, swizzled);
                if (plant == Plant::not_transposed) {
                    ldmatrix_x4(b_registers, address);
                } else {
                    ldmatrix_x4_trans(b_registers, address);
                }
                const uint32_t left[2] = {b_registers[0], b_registers[1]};
                const uint32_t right[2] = {b_registers[2], b_registers[3]};
                if (plant == Plant::mma_in_a_branch && lane >= 24) continue;
                mma_m16n8k16<bf16>(sums[2 * n], a_registers, left);
                mma_m16n8k16<bf16>(sums[2 * n + 1], a_registers, right);
            }
        }
        if (plant != Plant::no_barrier_before_refill) __syncthreads();
    }
    if (plant != Plant::one_tile_too_many) cp_async_wait<0>();
    for (int n = 0; n < 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int row = warp * 16 + lane / 4 + i / 2 * 8;
            c[row * columns + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
        }
    }
}

void expect_product(int k_count, Plant plant, size_t shared_bytes = 2 * stage_bytes) {
    const Buffer<bf16> a = whole_numbers<bf16>(rows * k_count);
    const Buffer<bf16> b = whole_numbers<bf16>(k_count * columns);
    Buffer<float> c(rows * columns);
    launch(product, dim3(1), dim3(64), shared_bytes, nullptr, c.data(), a.data(), b.data(), k_count,
           plant);
    expect_equal(c,
                 exactly(rows * columns,
                         [&](int64_t i) {
                             double sum = 0;
                             for (int64_t k = 0; k < k_count; ++k) {
                                 sum += to_double(a[i / columns * k_count + k]) *
                                        to_double(b[k * columns + i % columns]);
                             }
                             return sum;
                         }),
                 "product");
}

BUG("cp.async waited for with one group too many under way") {
    expect_product(160, planted ? Plant::wait_for_too_few : Plant::none);
}
BUG("cp.async without a commit") { expect_product(160, planted ? Plant::no_commit : Plant::none); }
BUG("no barrier after the wait for cp.async") {
    expect_product(160, planted ? Plant::no_barrier_after_wait : Plant::none);
}
BUG("stage refilled while other warps still read it") {
    expect_product(160, planted ? Plant::no_barrier_before_refill : Plant::none);
}
BUG("prefetch of a tile that nobody waits for") {
    expect_product(160, planted ? Plant::one_tile_too_many : Plant::none);
}
BUG("cp.async of the last tile not predicated") {
    expect_product(160, planted ? Plant::not_predicated : Plant::none);
}
BUG("cp.async from rows whose stride is no multiple of 16 bytes") {
    expect_product(planted ? 164 : 160, Plant::none);
}
BUG("shared memory for one stage where two are used") {
    expect_product(160, Plant::none, planted ? stage_bytes : 2 * stage_bytes);
}
BUG("swizzle forgotten where the tile is read") {
    expect_product(160, planted ? Plant::swizzle_forgotten : Plant::none);
}
BUG("no swizzle: every ldmatrix meets bank conflicts") {
    const simulator::Statistics before = simulator::statistics();
    expect_product(160, planted ? Plant::no_swizzle_at_all : Plant::none);
    const simulator::Statistics after = simulator::statistics();
    const auto passes = after.ldmatrix_passes - before.ldmatrix_passes;
    const auto matrices = after.ldmatrix_matrices - before.ldmatrix_matrices;
    expect(passes == matrices, std::to_string(passes) + " passes over the banks for " +
                                   std::to_string(matrices) + " matrices");
}
BUG("mma with two registers of an operand swapped") {
    expect_product(160, planted ? Plant::registers_swapped : Plant::none);
}
BUG("ldmatrix without .trans where the operand lies transposed") {
    expect_product(160, planted ? Plant::not_transposed : Plant::none);
}
BUG("ldmatrix from an address between two chunks") {
    expect_product(160, planted ? Plant::half_a_chunk : Plant::none);
}
BUG("ldmatrix of rows beyond the tile") {
    expect_product(160, planted ? Plant::rows_beyond_the_tile : Plant::none);
}
BUG("mma in a branch that not all lanes take") {
    expect_product(160, planted ? Plant::mma_in_a_branch : Plant::none);
}

}  // namespace gpt2fast::simulated::tensor_cores
