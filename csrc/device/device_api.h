// Where the kernels meet a machine: under nvcc these are PTX instructions (sm_80 and up), under
// any other compiler the simulator in sim/, which runs the same kernels on a CPU for tests.
// Kernels include this and common/ only. docs/simulator.md says what the simulator finds.
//
//   GPT2FAST_SHARED(name);           unsigned char* name: the launch's shared memory, aligned to
//                                    1024 bytes. There is no other: kernels carve it by hand
//   shared_address(pointer)          its 32-bit address, for what follows
//   cp_async<Bytes>(to, from, valid) 4, 8 or 16 bytes of global memory; not valid: zeros, and
//                                    `from` (any aligned pointer) isn't read
//   cp_async_commit()                what was started since the last one is a group
//   cp_async_wait<N>()               until N groups at most are under way: one's own copies only,
//                                    so that a barrier follows before others' are read
//   ldmatrix_x4(r, address)          four 8 x 8 matrices of 16 bits, rows at the lanes' addresses;
//   ldmatrix_x2, _x4_trans, _x2_trans
//   mma_m16n8k16<T>(c, a, b)         c += a b, T = bf16 or fp16, accumulated in fp32
//   named_barrier_sync(id, threads)  ids 1 to 15; threads counts those that sync or arrive
//   named_barrier_arrive(id, threads)
//   exp2_approx(x)                   within 2 ulp, results below 2^-126 are 0
//   tanh_approx(x)                   within 2^-11: for 16-bit storage only
//   to_float(x), from_float<T>(x)    T = float, bf16, fp16; rounds to nearest even. An int8_t is
//                                    read alike
//   pack2<T>(low, high)              two of them in 32 bits
//   load_vector<N>(pointer)          N elements in one access of N * sizeof(T) bytes, aligned to
//   store_vector(pointer, vector)    as many
//   load_words<N>(pointer)           N * 4 bytes in one access, whatever they hold
//
// On the host:
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)
//   clear(pointer, bytes, stream)    zeros, in the stream's order
//   use_device(index)                makes a device the current one
//   multiprocessors()                of the current device
//   stream_of(void*)                 as a cudaStream_t
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#else
#include "sim/ampere.h"
#include "sim/builtins.h"
#include "sim/launch.h"
#endif

namespace gpt2fast::device {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    static_assert(sizeof(T) * N <= 16, "a thread loads 16 bytes at a time");
    T v[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(int8_t x) { return float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
    return __float2half_rn(x);
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

#if defined(__CUDACC__)

#define GPT2FAST_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int Bytes>
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, bool valid = true) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    const int read = valid ? Bytes : 0;
    if constexpr (Bytes == 16) {  // past the first cache: another block may want it, this one not
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
                     "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;\n" ::"r"(to), "l"(from),
                     "r"(read), "n"(Bytes)
                     : "memory");
    }
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* pointer) {
    return *reinterpret_cast<const Vector<T, N>*>(pointer);
}

template <int N>
__device__ __forceinline__ Vector<uint32_t, N> load_words(const void* pointer) {
    return *static_cast<const Vector<uint32_t, N>*>(pointer);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, N>& vector) {
    *reinterpret_cast<Vector<T, N>*>(pointer) = vector;
}

inline void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
    }
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device));
    return device;
}

// An attribute of the current device, asked for once: launchers need some for every kernel.
inline int attribute(cudaDeviceAttr which) {
    static std::mutex mutex;
    static std::map<std::pair<int, cudaDeviceAttr>, int> known;
    const std::pair<int, cudaDeviceAttr> key{current_device(), which};
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, key.first));
    known[key] = value;
    return value;
}

// Lets a kernel ask for all the shared memory that a block may have, once on each device. Each
// launch's own size would be lowered by another thread before the launch.
inline void allow_shared_memory(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*>> allowed;
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const std::pair<int, const void*> key{current_device(), kernel};
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count(key) != 0) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    allowed.insert(key);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
    if (shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline void clear(void* pointer, size_t bytes, cudaStream_t stream) {
    check(cudaMemsetAsync(pointer, 0, bytes, stream));
}

inline void use_device(int index) {
    if (current_device() != index) check(cudaSetDevice(index));
}

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

#else

#define GPT2FAST_SHARED(name) unsigned char* const name = ::gpt2fast::simulator::block().shared

inline uint32_t shared_address(const void* pointer, GPT2FAST_SITE) {
    return simulator::shared_address(pointer, site);
}

template <int Bytes>
void cp_async(uint32_t to, const void* from, bool valid = true, GPT2FAST_SITE) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    simulator::copy_async(to, from, Bytes, valid, site);
}

inline void cp_async_commit() { simulator::commit_async_copies(); }

template <int N>
void cp_async_wait() {
    simulator::wait_for_async_copies(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, GPT2FAST_SITE) {
    simulator::ldmatrix<4, false>(r, address, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, GPT2FAST_SITE) {
    simulator::ldmatrix<4, true>(r, address, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address, GPT2FAST_SITE) {
    simulator::ldmatrix<2, false>(r, address, site);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address, GPT2FAST_SITE) {
    simulator::ldmatrix<2, true>(r, address, site);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GPT2FAST_SITE) {
    simulator::mma_m16n8k16<T>(c, a, b, site);
}

inline void named_barrier_sync(int id, int threads, GPT2FAST_SITE) {
    simulator::named_barrier(id, threads, /*wait=*/true, site);
}

inline void named_barrier_arrive(int id, int threads, GPT2FAST_SITE) {
    simulator::named_barrier(id, threads, /*wait=*/false, site);
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}

// As coarse as the instruction: 11 bits of the result are right.
inline float tanh_approx(float x) {
    const float y = std::tanh(x);
    uint32_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    bits &= 0xFFFFE000u;
    float coarse;
    std::memcpy(&coarse, &bits, sizeof coarse);
    return y == y ? coarse : y;
}

template <class T, int N>
void check_alignment(const T* pointer, const char* what, const simulator::Site& site) {
    if (reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * N) != 0) {
        simulator::fail(std::string(what) + ": the address is not aligned to " +
                            std::to_string(sizeof(T) * N) + " bytes",
                        site);
    }
}

template <int N, class T>
Vector<T, N> load_vector(const T* pointer, GPT2FAST_SITE) {
    check_alignment<T, N>(pointer, "load_vector", site);
    return *reinterpret_cast<const Vector<T, N>*>(pointer);
}

template <int N>
Vector<uint32_t, N> load_words(const void* pointer, GPT2FAST_SITE) {
    check_alignment<uint32_t, N>(static_cast<const uint32_t*>(pointer), "load_words", site);
    Vector<uint32_t, N> words;
    std::memcpy(&words, pointer, sizeof words);
    return words;
}

template <class T, int N>
void store_vector(T* pointer, const Vector<T, N>& vector, GPT2FAST_SITE) {
    check_alignment<T, N>(pointer, "store_vector", site);
    *reinterpret_cast<Vector<T, N>*>(pointer) = vector;
}

using simulator::launch;

inline void clear(void* pointer, size_t bytes, cudaStream_t) { std::memset(pointer, 0, bytes); }

inline void use_device(int) {}

// Few, so that a kernel which divides its work among them meets several shares each.
inline int multiprocessors() { return 4; }

#endif

}  // namespace gpt2fast::device
