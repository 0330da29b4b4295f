#include "layouts.h"

#include "../testing.h"
#include "device/hopper.h"

#include <cute/tensor.hpp>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace gpt2fast::simulated {
namespace {

using device::from_float;
using device::launch;
using device::pack2;

// ------------------------------------------------------------------------------------------ mma

// Fragments are filled and read as CuTe lays them out; the simulator multiplies.
template <class T, class Atom>
__global__ void multiply(float* c, const float* a, const float* b) {
    using Traits = cute::MMA_Traits<Atom>;
    const int t = int(threadIdx.x);
    const auto a_at = [&](int v) {  // (row, k), rows first
        const int i = typename Traits::ALayout{}(t, v);
        return a[i % 16 * 16 + i / 16];
    };
    const auto b_at = [&](int v) {  // (column, k), columns first
        const int i = typename Traits::BLayout{}(t, v);
        return b[i / 8 * 8 + i % 8];
    };
    const auto c_at = [&](int v) {
        const int i = typename Traits::CLayout{}(t, v);
        return i % 16 * 8 + i / 16;
    };
    uint32_t a_registers[4], b_registers[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) a_registers[i] = pack2<T>(a_at(2 * i), a_at(2 * i + 1));
    for (int i = 0; i < 2; ++i) b_registers[i] = pack2<T>(b_at(2 * i), b_at(2 * i + 1));
    for (int i = 0; i < 4; ++i) sums[i] = c[c_at(i)];
    device::mma_m16n8k16<T>(sums, a_registers, b_registers);
    for (int i = 0; i < 4; ++i) c[c_at(i)] = sums[i];
}

template <class T, class Atom>
int mma_mismatches() {
    Random random;
    Buffer<float> a(16 * 16), b(16 * 8), c(16 * 8);
    for (int i = 0; i < 16 * 16; ++i) a[i] = float(random.below(17) - 8);
    for (int i = 0; i < 16 * 8; ++i) b[i] = float(random.below(17) - 8);
    for (int i = 0; i < 16 * 8; ++i) c[i] = float(random.below(17) - 8);
    std::vector<float> exact(16 * 8);
    for (int i = 0; i < 16 * 8; ++i) {
        exact[size_t(i)] = c[i];
        for (int k = 0; k < 16; ++k) exact[size_t(i)] += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
    }
    launch(multiply<T, Atom>, dim3(1), dim3(32), 0, nullptr, c.data(), a.data(), b.data());
    int mismatches = 0;
    for (int i = 0; i < 16 * 8; ++i) mismatches += c[i] != exact[size_t(i)];
    return mismatches;
}

// ------------------------------------------------------------------------------------- ldmatrix

// Half i of shared memory is i; each lane gives the address of 8 of them.
template <int Matrices, bool Transposed>
__global__ void load_matrices(uint32_t* registers) {
    GPT2FAST_SHARED(memory);
    const int t = int(threadIdx.x);
    for (int i = 0; i < 8; ++i) {
        reinterpret_cast<uint16_t*>(memory)[t * 8 + i] = uint16_t(t * 8 + i);
    }
    __syncwarp();
    const uint32_t address = device::shared_address(memory) + uint32_t(t) * 16;
    uint32_t r[Matrices];
    if constexpr (Matrices == 4 && Transposed) device::ldmatrix_x4_trans(r, address);
    if constexpr (Matrices == 4 && !Transposed) device::ldmatrix_x4(r, address);
    if constexpr (Matrices == 2 && Transposed) device::ldmatrix_x2_trans(r, address);
    if constexpr (Matrices == 2 && !Transposed) device::ldmatrix_x2(r, address);
    for (int i = 0; i < Matrices; ++i) registers[t * Matrices + i] = r[i];
}

template <class Atom, int Matrices, bool Transposed>
int ldmatrix_mismatches() {
    Buffer<uint32_t> registers(32 * Matrices);
    launch(load_matrices<Matrices, Transposed>, dim3(1), dim3(32), 512, nullptr, registers.data());
    // CuTe maps (thread, bit) of both sides to the bits of one logical matrix.
    using Traits = cute::Copy_Traits<Atom>;
    std::map<int, int> half_at;
    for (int t = 0; t < 8 * Matrices; ++t) {
        for (int bit = 0; bit < 128; bit += 16) {
            half_at[typename Traits::SrcLayout{}(t, bit)] = t * 8 + bit / 16;
        }
    }
    int mismatches = 0;
    for (int t = 0; t < 32; ++t) {
        for (int v = 0; v < 2 * Matrices; ++v) {
            const uint32_t pair = registers[t * Matrices + v / 2];
            const int half = int(pair >> v % 2 * 16 & 0xFFFFu);
            mismatches += half != half_at.at(typename Traits::DstLayout{}(t, v * 16));
        }
    }
    return mismatches;
}

// --------------------------------------------------------------------------- Hopper: TMA and wgmma

__global__ void load_box(uint16_t* halves, const __grid_constant__ device::TensorMap map) {
    GPT2FAST_SHARED(memory);
    const uint32_t box = device::shared_address(memory), bar = box + 64 * 128;
    if (threadIdx.x == 0) {
        device::mbarrier_init(bar, 1);
        device::mbarrier_init_fence();
        device::mbarrier_arrive_expect(bar, 64 * 128);
        device::tma_load(box, map, bar, 0, 0);
        device::mbarrier_wait(bar, 0);
        memcpy(halves, memory, 64 * 128);
    }
}

auto swizzled_tile() {
    using namespace cute;
    return as_position_independent_swizzle_layout(
        tile_to_shape(GMMA::Layout_K_SW128_Atom<cutlass::bfloat16_t>{}, Shape<_64, _64>{}));
}

int swizzle_mismatches() {
    Buffer<uint16_t> matrix(64 * 64), box(64 * 64);
    for (int i = 0; i < 64 * 64; ++i) matrix[i] = uint16_t(i);
    launch(load_box, dim3(1), dim3(32), 64 * 128 + 8, nullptr, box.data(),
           device::tensor_map<device::bf16>(matrix.data(), 64, 64, 128, 64));
    int mismatches = 0;
    for (int i = 0; i < 64 * 64; ++i) mismatches += box[swizzled_tile()(i / 64, i % 64)] != i;
    return mismatches;
}

// Operands are laid out, and registers read, as CuTe says.
template <class T, int N, class Atom>
__global__ void multiply_warpgroup(float* c, const float* a, const float* b) {
    GPT2FAST_SHARED(memory);
    T* tiles = reinterpret_cast<T*>(memory);
    const int t = int(threadIdx.x);
    for (int i = t; i < 64 * 64; i += 128) {
        tiles[swizzled_tile()(i / 64, i % 64)] = from_float<T>(a[i]);
    }
    for (int i = t; i < N * 64; i += 128) {
        tiles[64 * 64 + i / 4096 * 4096 + swizzled_tile()(i / 64 % 64, i % 64)] =
            from_float<T>(b[i]);
    }
    device::fence_async_proxy();
    __syncthreads();
    const uint32_t address = device::shared_address(memory);
    float sums[N / 2];
    device::wgmma_fence();
    for (uint32_t k = 0; k < 4; ++k) {
        device::wgmma_m64k16<T, N>(sums, device::matrix_descriptor(address + k * 32),
                                   device::matrix_descriptor(address + 64 * 128 + k * 32), k > 0);
    }
    device::wgmma_commit();
    device::wgmma_wait<0>();
    for (int v = 0; v < N / 2; ++v) {
        const int i = typename cute::MMA_Traits<Atom>::CLayout{}(t, v);  // rows first
        c[i % 64 * N + i / 64] = sums[v];
    }
}

template <class T, int N, class Atom>
int wgmma_mismatches() {
    Random random;
    Buffer<float> a(64 * 64), b(N * 64), c(64 * N);
    for (int i = 0; i < 64 * 64; ++i) a[i] = float(random.below(17) - 8);
    for (int i = 0; i < N * 64; ++i) b[i] = float(random.below(17) - 8);
    launch(multiply_warpgroup<T, N, Atom>, dim3(1), dim3(128), (64 + N) * 128, nullptr, c.data(),
           a.data(), b.data());
    int mismatches = 0;
    for (int i = 0; i < 64 * N; ++i) {
        float sum = 0;
        for (int k = 0; k < 64; ++k) sum += a[i / N * 64 + k] * b[i % N * 64 + k];
        mismatches += c[i] != sum;
    }
    return mismatches;
}

}  // namespace

std::map<std::string, int> layout_mismatches() {
    using namespace cute;
    using device::bf16;
    using device::fp16;
    constexpr auto K = GMMA::Major::K;
    return {
        {"mma bf16", mma_mismatches<bf16, SM80_16x8x16_F32BF16BF16F32_TN>()},
        {"mma fp16", mma_mismatches<fp16, SM80_16x8x16_F32F16F16F32_TN>()},
        {"ldmatrix x4", ldmatrix_mismatches<SM75_U32x4_LDSM_N, 4, false>()},
        {"ldmatrix x2", ldmatrix_mismatches<SM75_U32x2_LDSM_N, 2, false>()},
        {"ldmatrix x4 trans", ldmatrix_mismatches<SM75_U16x8_LDSM_T, 4, true>()},
        {"ldmatrix x2 trans", ldmatrix_mismatches<SM75_U16x4_LDSM_T, 2, true>()},
        // A comparison that must fail.
        {"ldmatrix x4 against trans", ldmatrix_mismatches<SM75_U16x8_LDSM_T, 4, false>()},
        {"128-byte swizzle", swizzle_mismatches()},
        {"wgmma bf16 n64", wgmma_mismatches<bf16, 64, SM90_64x64x16_F32BF16BF16_SS<K, K>>()},
        {"wgmma bf16 n128", wgmma_mismatches<bf16, 128, SM90_64x128x16_F32BF16BF16_SS<K, K>>()},
        {"wgmma fp16 n64", wgmma_mismatches<fp16, 64, SM90_64x64x16_F32F16F16_SS<K, K>>()},
    };
}

}  // namespace gpt2fast::simulated
