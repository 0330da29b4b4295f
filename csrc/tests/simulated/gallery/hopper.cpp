// Bugs around mbarriers, TMA and wgmma, in one product of two matrices.
#include "gallery.h"

namespace gpt2fast::simulated::hopper {

using namespace device;

enum class Plant {
    none,
    read_before_wait,
    no_commit,
    no_fence,
    refill_too_early,
    too_few_bytes,
    too_many_bytes,
    too_few_arrivals,
    too_many_arrivals,
    wrong_parity,
    no_barrier_after_init,
    wrong_step,
    unaligned_tile,
};

// C (64 x 64) = A (64 x K) B (64 x K)^T: one thread fills two stages, a warpgroup multiplies.
constexpr uint32_t tile_bytes = 64 * 128, stage_bytes = 2 * tile_bytes;

__device__ void produce(uint32_t stages, uint32_t full, uint32_t empty, const TensorMap& a,
                        const TensorMap& b, int tiles, Plant plant) {
    const int expected = plant == Plant::too_few_bytes    ? tile_bytes
                         : plant == Plant::too_many_bytes ? stage_bytes + 128
                                                          : stage_bytes;
    for (int j = 0; j < tiles; ++j) {
        const uint32_t stage = stages + uint32_t(j % 2) * stage_bytes, bar = uint32_t(j % 2) * 8;
        const uint32_t shift = plant == Plant::unaligned_tile ? 128 : 0;
        const unsigned parity = unsigned(j / 2 % 2) ^ (plant == Plant::wrong_parity ? 0 : 1);
        if (plant != Plant::refill_too_early) mbarrier_wait(empty + bar, parity);
        mbarrier_arrive_expect(full + bar, expected);
        tma_load(stage + shift, a, full + bar, j * 64, 0);
        tma_load(stage + tile_bytes, b, full + bar, j * 64, 0);
    }
}

__device__ void consume(float* c, uint32_t stages, uint32_t full, uint32_t empty, int tiles,
                        Plant plant) {
    const int t = int(threadIdx.x);
    float sums[32];
    for (int j = 0; j < tiles; ++j) {
        const uint32_t stage = stages + uint32_t(j % 2) * stage_bytes, bar = uint32_t(j % 2) * 8;
        mbarrier_wait(full + bar, unsigned(j / 2 % 2));
        if (plant != Plant::no_fence) wgmma_fence();
        for (uint32_t k = 0; k < 4; ++k) {
            const uint32_t step = k * (plant == Plant::wrong_step ? 16 : 32);
            wgmma_m64k16<bf16, 64>(sums, matrix_descriptor(stage + step),
                                   matrix_descriptor(stage + tile_bytes + step), j > 0 || k > 0);
        }
        if (plant != Plant::no_commit) wgmma_commit();
        if (plant != Plant::read_before_wait || j + 1 < tiles) wgmma_wait<0>();
        mbarrier_arrive(empty + bar);
    }
    for (int i = 0; i < 32; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
        c[row * 64 + i / 4 * 8 + t % 4 * 2 + i % 2] = sums[i];
    }
    wgmma_wait<0>();
}

__global__ void __launch_bounds__(160)
    product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c,
            int k_count, Plant plant) {
    GPT2FAST_SHARED(memory);
    const uint32_t stages = shared_address(memory);
    const uint32_t full = stages + 2 * stage_bytes, empty = full + 16;
    const int tiles = (k_count + 63) / 64;
    if (threadIdx.x == 0) {
        const int consumers = plant == Plant::too_few_arrivals    ? 64
                              : plant == Plant::too_many_arrivals ? 160
                                                                  : 128;
        for (uint32_t i = 0; i < 2; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, consumers);
        }
        mbarrier_init_fence();
    }
    if (plant != Plant::no_barrier_after_init) __syncthreads();
    if (threadIdx.x < 128) {
        consume(c, stages, full, empty, tiles, plant);
    } else if (threadIdx.x == 128) {
        produce(stages, full, empty, a, b, tiles, plant);
    }
}

void expect_product(Plant plant) {
    const int k_count = 264;
    const Buffer<bf16> a = whole_numbers<bf16>(64 * k_count), b = whole_numbers<bf16>(64 * k_count);
    Buffer<float> c(64 * 64);
    launch(product, dim3(1), dim3(160), 2 * stage_bytes + 32, nullptr,
           tensor_map<bf16>(a.data(), 64, k_count, 2 * k_count, 64),
           tensor_map<bf16>(b.data(), 64, k_count, 2 * k_count, 64), c.data(), k_count, plant);
    expect_equal(c,
                 exactly(64 * 64,
                         [&](int64_t i) {
                             double sum = 0;
                             for (int64_t k = 0; k < k_count; ++k) {
                                 sum += to_double(a[i / 64 * k_count + k]) *
                                        to_double(b[i % 64 * k_count + k]);
                             }
                             return sum;
                         }),
                 "product");
}

BUG("wgmma's registers read before the wait") {
    expect_product(planted ? Plant::read_before_wait : Plant::none);
}
BUG("wgmma without a commit") { expect_product(planted ? Plant::no_commit : Plant::none); }
BUG("wgmma without a fence") { expect_product(planted ? Plant::no_fence : Plant::none); }
BUG("TMA into a stage whose consumers are not done") {
    expect_product(planted ? Plant::refill_too_early : Plant::none);
}
BUG("mbarrier that expects too few bytes") {
    expect_product(planted ? Plant::too_few_bytes : Plant::none);
}
BUG("mbarrier that expects too many bytes") {
    expect_product(planted ? Plant::too_many_bytes : Plant::none);
}
BUG("mbarrier that counts too few arrivals") {
    expect_product(planted ? Plant::too_few_arrivals : Plant::none);
}
BUG("mbarrier that counts too many arrivals") {
    expect_product(planted ? Plant::too_many_arrivals : Plant::none);
}
BUG("mbarrier waited for with the wrong parity") {
    expect_product(planted ? Plant::wrong_parity : Plant::none);
}
BUG("mbarrier used before all threads know that it is initialized") {
    expect_product(planted ? Plant::no_barrier_after_init : Plant::none);
}
BUG("wgmma's next 16 columns looked for 16 bytes on") {
    expect_product(planted ? Plant::wrong_step : Plant::none);
}
BUG("TMA into a tile that is not aligned to its swizzle") {
    expect_product(planted ? Plant::unaligned_tile : Plant::none);
}

}  // namespace gpt2fast::simulated::hopper
