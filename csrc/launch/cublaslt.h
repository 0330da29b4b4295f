// Matrix products by cuBLASLt, whose epilogues do what otherwise takes a pass of its own.
//
// Bytes of an element of the inner layer (T tokens x 4C, 16 bits), over all passes of gelu_mlp:
//
//              torch's products, kernels/mlp.cuh between them     epilogues
//   inference  write z; read z, write gelu; read gelu: 8          GELU_BIAS, without z: 4
//   forward    the same: 8                                        GELU_AUX_BIAS, z not read: 6
//   backward   write d; read d and z, write dz and gelu;          DGELU_BGRAD, reads z, writes dz;
//              read gelu once and dz twice: 16                    read z, write gelu; the rest: 14
//
// and BGRADA spares the 2 bytes an element of the output's gradient (T x C) that summing its rows
// reads. At T = 16,384, C = 768 and 4.8 TB/s this is 42 us less in inference, 21 us forward, 26 us
// backward, beside products that take 0.16 and 0.31 ms at 989 TFLOP/s. BIAS spares nothing beside
// torch.addmm, which has the same epilogue. Keeping gelu from the forward pass would spare another
// 4 bytes backward, for as much memory as the layer keeps otherwise.
//
// The cost of an epilogue cannot be counted. llm.c fuses GELU, forward and backward, from compute
// capability 9.0 on and not below, and so does gpt2fast/ops/cuda/cublaslt.py. Not yet run on a GPU:
// benchmarks/test_gpu_ops.py times both.
//
// The library is looked up at run time: nothing is linked with it, and only its header is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "launch.h"

namespace gpt2fast::launch {

enum class Epilogue {
    bias,           // out = a b + bias
    gelu_bias,      // out = gelu(inner), inner = a b + bias, which is written where it is not null
    gelu_gradient,  // out = gelu'(inner) * (a b); bias = the sums of out's columns
    column_sums,    // out = a b; bias = the sums of b's columns
};

// A matrix one of whose dimensions is contiguous.
struct Operand {
    const void* data;
    int64_t rows, columns, row_stride, column_stride;
};

struct Matmul {
    Operand a, b;  // (m, k) and (k, n)
    void* out;     // (m, n), contiguous
    Epilogue epilogue;
    void* bias;   // (n,), contiguous
    void* inner;  // (m, n), contiguous
    DType dtype;  // of all of them: float16 or bfloat16
    int device;
};

struct MatmulPlan {
    uint64_t algorithm[8] = {};  // cublasLtMatmulAlgo_t
    size_t workspace_bytes = 0;
};

// Aligned to this.
constexpr size_t workspace_alignment = 256;

// Why there is no cuBLASLt for the device, or nothing.
std::string cublaslt_missing(int device);

// How to compute such a product; false where cuBLASLt cannot, or is not there. Looked up once for
// each combination of sizes, strides, alignments, dtype, epilogue and device.
bool plan_matmul(const Matmul& matmul, MatmulPlan& plan);

// The first product on a device creates cuBLASLt's handle, which a CUDA graph cannot capture.
void run_matmul(const Matmul& matmul, const MatmulPlan& plan, void* workspace, void* stream);

}  // namespace gpt2fast::launch
