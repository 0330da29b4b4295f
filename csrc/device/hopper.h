// Hopper's own instructions (sm_90a): mbarriers, tensor-map copies (TMA) and wgmma; the same split
// as device_api.h. Kernels that include it are compiled with
//
//     nvcc -gencode arch=compute_90a,code=sm_90a     (-arch=sm_90a also emits what rejects wgmma)
//
//   tensor_map<T>(base, rows, columns, row_bytes, box_rows)      host: a matrix in global memory,
//                                    copied in boxes of box_rows x 64 elements of 16 bits; the
//                                    parameter that takes it is const __grid_constant__ TensorMap
//   mbarrier_init(bar, arrivals)     one thread; then mbarrier_init_fence() and a barrier
//   mbarrier_arrive(bar), mbarrier_arrive_expect(bar, bytes)
//   mbarrier_wait(bar, parity)       until the phase of this parity is over: 0 for the first
//   tma_load(to, map, bar, column, row)      a box in the 128-byte swizzle (to: 1024-aligned);
//                                    zeros beyond the matrix; its bytes count at bar
//   matrix_descriptor(address)       rows of 64 elements in the 128-byte swizzle; the next 16
//                                    columns are 32 bytes on
//   wgmma_fence()                    before the first wgmma, and after registers were written
//   wgmma_m64k16<T, N>(c, a, b, add) c (64 x N, over a warpgroup) = a b^T, or += with add; the
//                                    operands, 64 x 16 and N x 16, by descriptor; N = 64 or 128
//   wgmma_commit(), wgmma_wait<N>()  as cp_async's; c may not be touched in between
//   fence_async_proxy()              what this thread wrote to shared memory is seen by wgmma
//                                    and TMA (the simulator takes it for granted)
#pragma once

#include "device_api.h"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "sim/hopper.h"
#endif

namespace gpt2fast::device {

// Start address, stride of 8 rows and the swizzle: PTX ISA, "Matrix Descriptor".
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
    constexpr uint64_t eight_rows = 8 * 128 >> 4, swizzle_128 = 1;
    return uint64_t(address >> 4 & 0x3FFFu) | uint64_t(1) << 16 | eight_rows << 32 |
           swizzle_128 << 62;
}

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

template <class T>
TensorMap tensor_map(const void* base, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows) {
    static_assert(sizeof(T) == 2, "16-bit elements");
    // The driver is asked at run time: a library that needed it would not load without one.
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) {
        throw std::runtime_error("CUDA: this driver has no tensor maps");
    }
    using Encode = decltype(&cuTensorMapEncodeTiled);
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
    const cuuint64_t strides[1] = {cuuint64_t(row_bytes)};
    const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
    TensorMap map;
    const CUresult status = reinterpret_cast<Encode>(function)(
        &map,
        std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2, const_cast<void*>(base), sizes, strides, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("CUDA: no tensor map of this matrix");
    return map;
}

__device__ __forceinline__ void mbarrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t bar, unsigned parity) {
    uint32_t over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(over)
            : "r"(bar), "r"(parity)
            : "memory");
    } while (over == 0);
}

__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap& map, uint32_t bar,
                                         int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(bar), "r"(column), "r"(row)
        : "memory");
}

__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <class T, int N>
struct Wgmma;

#define GPT2FAST_8(i)                                                                           \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
        "+f"(c[i + 6]), "+f"(c[i + 7])
#define GPT2FAST_32(i) GPT2FAST_8(i), GPT2FAST_8(i + 8), GPT2FAST_8(i + 16), GPT2FAST_8(i + 24)
#define GPT2FAST_WGMMA_64(T, type)                                                            \
    template <>                                                                               \
    struct Wgmma<T, 64> {                                                                     \
        static __device__ __forceinline__ void run(float (&c)[32], uint64_t a, uint64_t b,    \
                                                   int add) {                                 \
            asm volatile(                                                                     \
                "{\n"                                                                         \
                ".reg .pred p;\n"                                                             \
                "setp.ne.b32 p, %34, 0;\n"                                                    \
                "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
                " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
                "%31}, %32, %33, p, 1, 1, 0, 0;\n"                                            \
                "}\n"                                                                         \
                : GPT2FAST_32(0)                                                              \
                : "l"(a), "l"(b), "r"(add));                                                  \
        }                                                                                     \
    };
#define GPT2FAST_WGMMA_128(T, type)                                                           \
    template <>                                                                               \
    struct Wgmma<T, 128> {                                                                    \
        static __device__ __forceinline__ void run(float (&c)[64], uint64_t a, uint64_t b,    \
                                                   int add) {                                 \
            asm volatile(                                                                     \
                "{\n"                                                                         \
                ".reg .pred p;\n"                                                             \
                "setp.ne.b32 p, %66, 0;\n"                                                    \
                "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                  \
                " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
                "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
                "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
                "%61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n"                                  \
                "}\n"                                                                         \
                : GPT2FAST_32(0), GPT2FAST_32(32)                                             \
                : "l"(a), "l"(b), "r"(add));                                                  \
        }                                                                                     \
    };
GPT2FAST_WGMMA_64(bf16, "bf16")
GPT2FAST_WGMMA_64(fp16, "f16")
GPT2FAST_WGMMA_128(bf16, "bf16")
GPT2FAST_WGMMA_128(fp16, "f16")
#undef GPT2FAST_WGMMA_128
#undef GPT2FAST_WGMMA_64
#undef GPT2FAST_32
#undef GPT2FAST_8

template <class T, int N>
__device__ __forceinline__ void wgmma_m64k16(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) {
    Wgmma<T, N>::run(c, a, b, add);
}

#else

using simulator::TensorMap;

template <class T>
TensorMap tensor_map(const void* base, int64_t rows, int64_t columns, int64_t row_bytes,
                     int box_rows) {
    static_assert(sizeof(T) == 2, "16-bit elements");
    return simulator::tensor_map(base, rows, columns, row_bytes, box_rows);
}

inline void mbarrier_init(uint32_t bar, int arrivals, GPT2FAST_SITE) {
    simulator::init_mbarrier(bar, arrivals, site);
}

inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(uint32_t bar, GPT2FAST_SITE) {
    simulator::arrive_at_mbarrier(bar, 0, site);
}

inline void mbarrier_arrive_expect(uint32_t bar, int bytes, GPT2FAST_SITE) {
    simulator::arrive_at_mbarrier(bar, bytes, site);
}

inline void mbarrier_wait(uint32_t bar, unsigned parity, GPT2FAST_SITE) {
    simulator::wait_for_mbarrier(bar, parity, site);
}

inline void tma_load(uint32_t to, const TensorMap& map, uint32_t bar, int column, int row,
                     GPT2FAST_SITE) {
    simulator::load_box(to, map, bar, column, row, site);
}

inline void fence_async_proxy() {}

inline void wgmma_fence(GPT2FAST_SITE) { simulator::fence_wgmma(site); }

inline void wgmma_commit(GPT2FAST_SITE) { simulator::commit_wgmma(site); }

template <int N>
void wgmma_wait(GPT2FAST_SITE) {
    simulator::wait_for_wgmma(N, site);
}

template <class T, int N>
void wgmma_m64k16(float (&c)[N / 2], uint64_t a, uint64_t b, bool add, GPT2FAST_SITE) {
    static_assert(N == 64 || N == 128, "written for 64 and 128 columns");
    simulator::wgmma<T, N>(c, a, b, add, site);
}

#endif

}  // namespace gpt2fast::device
