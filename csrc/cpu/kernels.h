// The kernels of an instruction set: a table of functions, filled by isa/<name>.cpp.
//
// A kernel of a single op handles rows [begin, end) of its arguments and starts no thread: who
// calls decides how ranges are spread. Only the whole-model step takes a thread team.
#pragma once

#include <cstdint>

#include "../common/sampling.h"
#include "../common/shapes.h"
#include "step.h"
#include "types.h"

namespace gpt2fast {

// A matrix as a product takes it: lines (rows of the left matrix, columns of the right one) of
// inputs, over which is summed. One of the two strides is 1; they count elements.
struct View {
    const void* data;
    int64_t line_stride, input_stride;
    DType dtype;
};

// How a product is cut up. Only who computes what depends on it, not what is computed.
struct MatmulPlan {
    int64_t tiles;          // items of matmul_pack
    int64_t parts, groups;  // of rows, of columns: items of matmul are their pairs
    int64_t workspace;      // bytes that `packed` needs
};

// out (rows, columns) = before + a b + bias, over some of the inputs: with more of them than
// `matmul_inputs` it is cut, and `before` is what the earlier ones gave.
struct Matmul {
    View a, b;
    void* out;
    int64_t out_stride;
    DType out_dtype;
    const float* before;  // (rows, columns), or null; may be out
    int64_t before_stride;
    const float* bias;   // (columns), or null
    float* column_sums;  // (columns), or null: the sum of b over the inputs
    bool add_to_sums;    // rather than write them
    int64_t rows, columns, inputs;
    Format format;  // what is multiplied: float32, or bfloat16 of either dtype
    MatmulPlan plan;
    float* packed;
};

// out[i, j] = gelu(x[i, j] + bias[j]); rows i of x are x_stride elements apart, of out `columns`.
struct BiasGelu {
    const void* x;
    const void* bias;
    void* out;
    int64_t columns;
    int64_t x_stride;
    DType dtype;
};

// `rows` rows in `count` blocks of nearly equal size, by their number alone: what is summed block
// by block does not depend on the number of threads.
struct Blocks {
    int64_t rows, count;
    int64_t begin(int64_t block) const { return rows * block / count; }
};

// From grad, the gradient of gelu(x + bias): grad_x, and its sums over each block of rows. The
// activation itself is written too where `activated` is given. grad_x may be grad.
struct BiasGeluBackward {
    const void* grad;
    const void* x;
    const void* bias;
    void* grad_x;
    void* activated;
    float* sums;  // (blocks, columns)
    Blocks blocks;
    int64_t columns;
    int64_t grad_stride, x_stride;
    DType dtype;
};

// out[j] = sum over blocks of sums[block * stride + j].
struct AddBlocks {
    const float* sums;
    void* out;
    int64_t blocks, stride;
    DType dtype;
};

// summed = x + residual, normed = (summed - mean) * rstd * weight + bias; without a residual
// nothing is written to `summed`. Rows of inputs are *_stride elements apart.
struct LayerNorm {
    const void* x;
    const void* residual;
    const void* weight;
    const void* bias;
    void* normed;
    void* summed;
    float* mean;
    float* rstd;
    int64_t columns;
    int64_t x_stride, residual_stride;
    float eps;
    DType x_dtype, residual_dtype, weight_dtype;
};

struct LayerNormBackward {
    const void* grad;
    const void* grad_summed;  // or null
    const void* summed;
    const void* weight;
    const float* mean;
    const float* rstd;
    void* grad_input;
    float* sums;  // (blocks, 2, columns): of weight's gradient, of bias's
    Blocks blocks;
    int64_t columns;
    int64_t grad_stride, grad_summed_stride, summed_stride;
    DType grad_dtype, summed_dtype, weight_dtype;
};

// causal_attention. One item is a block of `attention_queries` queries of one head; heads of a
// batch row follow each other, the blocks of a head too.
struct Attention {
    Heads<const void> q, k, v;  // of k and v: (batch, time, key heads, head size)
    void* out;                  // (batch, time, heads, head size)
    float* lse;                 // (batch, heads, time)
    const uint8_t* visible;     // (batch, time), or null: every position
    int64_t batch, time, heads, key_heads, head_dim;
    float scale;
    float dropout;  // probability
    uint64_t seed;
    DType dtype;
    bool causal;

    // Neighboring query heads that read one key head.
    int64_t group() const { return key_heads == 0 ? 1 : heads / key_heads; }
};

constexpr int64_t attention_queries = 32;

// One item is a key head.
struct AttentionBackward {
    Attention forward;  // out is read
    Heads<const void> grad, out;
    void *grad_q, *grad_k, *grad_v;  // laid out as out; of k and v: with key heads
};

// Rows of logits become losses and, with `differentiate`, their own gradients times `factor`.
struct CrossEntropy {
    void* logits;
    const int64_t* targets;
    float* losses;
    int64_t columns;
    int64_t ignore_index;
    float factor;
    bool differentiate;
    DType dtype;
};

// Some neighboring elements of a parameter, its gradient and its moments.
struct AdamWPiece {
    void* param;
    const void* grad;
    void* first;
    void* second;
    int64_t size;
    DType dtype, moment_dtype;
};

struct AdamW {
    const AdamWPiece* pieces;
    float beta1, beta2;
    float rest1, rest2;  // 1 - beta
    float kept;          // 1 - lr * weight_decay
    float rate;          // lr / (1 - beta1^step)
    float unbiasing;     // 1 / sqrt(1 - beta2^step)
    float eps;
};

// out[i] = wte[tokens[i]] + wpe[positions[i]]; tables and out are contiguous.
struct Embedding {
    const int64_t* tokens;
    const int64_t* positions;
    const void* wte;
    const void* wpe;
    void* out;
    int64_t columns;
    DType dtype;
};

// out[r] = sum of grad[i] over i in order[starts[r]] .. order[starts[r + 1] - 1], in that order, or
// out[r] plus that sum.
struct EmbeddingBackward {
    const void* grad;
    const int64_t* starts;
    const int64_t* order;
    void* out;
    int64_t columns;
    int64_t grad_stride;
    DType dtype, out_dtype;
    bool add;
};

// attention_with_cache. One item is a block of `attention_queries` queries of one head; heads
// follow each other within a block, the blocks of a batch row too.
struct CachedAttention {
    Heads<const void> q, k, v;  // of k and v: (rows, entries, heads, head size)
    const int64_t* lengths;     // (batch): entries before the queries' own
    void* out;                  // (batch, time, heads, head size)
    int64_t batch, time, heads, head_dim, entries;
    float scale;
    DType dtype, cache_dtype;
};

// New entries of one cache go behind each row's end. One item is an entry: row * time + t.
struct AppendToCache {
    Heads<const void> from;
    Heads<void> cache;
    const int64_t* lengths;  // (batch)
    const int64_t* counts;   // (batch), or null: all are stored
    int64_t time, heads, head_dim;
    DType dtype, cache_dtype;
};

// One step of moving rows; a row of -1 is a spare one.
struct RowCopy {
    int64_t to, from;
};

// Carries out a plan of copies in each entry of a cache. One item is an entry.
struct ReorderCache {
    uint8_t* cache;
    const RowCopy* plan;
    int64_t steps;
    int64_t row_stride, entry_stride, head_stride, head_bytes;  // bytes
    int64_t heads;
};

struct StepArgs;
class Worker;

// The kernels: what each returns, its name, its arguments. A new one is a line here and a function
// of that name in a header that kernel_table.h includes.
// clang-format off
#define GPT2FAST_OP_KERNELS(KERNEL)                                                               \
    KERNEL(void, bias_gelu, (const BiasGelu&, int64_t begin, int64_t end))                        \
    KERNEL(void, bias_gelu_backward, (const BiasGeluBackward&, int64_t begin, int64_t end))       \
    KERNEL(void, add_blocks, (const AddBlocks&, int64_t begin, int64_t end))                      \
    /* Whether a product of float32 (of bfloat16, if narrow) here is faster than torch's own. */  \
    KERNEL(bool, matmul_pays, (bool narrow, bool awkward))                                        \
    KERNEL(MatmulPlan, matmul_plan, (const Matmul&, int threads))                                 \
    KERNEL(void, matmul_pack, (const Matmul&, int64_t begin, int64_t end))                        \
    KERNEL(void, matmul, (const Matmul&, int64_t begin, int64_t end))                             \
    KERNEL(void, layer_norm, (const LayerNorm&, int64_t begin, int64_t end))                      \
    KERNEL(void, layer_norm_backward, (const LayerNormBackward&, int64_t begin, int64_t end))     \
    KERNEL(void, attention, (const Attention&, int64_t begin, int64_t end))                       \
    KERNEL(void, attention_backward, (const AttentionBackward&, int64_t begin, int64_t end))      \
    KERNEL(void, cross_entropy, (const CrossEntropy&, int64_t begin, int64_t end))                \
    KERNEL(void, adamw, (const AdamW&, int64_t begin, int64_t end))                               \
    KERNEL(void, embedding, (const Embedding&, int64_t begin, int64_t end))                       \
    KERNEL(void, embedding_backward, (const EmbeddingBackward&, int64_t begin, int64_t end))      \
    KERNEL(void, cached_attention, (const CachedAttention&, int64_t begin, int64_t end))          \
    KERNEL(void, append_to_cache, (const AppendToCache&, int64_t begin, int64_t end))             \
    KERNEL(void, reorder_cache, (const ReorderCache&, int64_t begin, int64_t end))                \
    KERNEL(void, sample, (const Sample&, int64_t begin, int64_t end, uint8_t* workspace))         \
    KERNEL(int64_t, sample_workspace, (const Sample&))  /* bytes for a thread */

// Those of the whole-model step, the only ones that multiply integers.
#define GPT2FAST_STEP_KERNELS(KERNEL)                                                             \
    KERNEL(void, step, (const StepArgs&, Worker&))                                                \
    KERNEL(int64_t, step_workspace, (const StepArgs&, int threads))  /* bytes */
// clang-format on

#define GPT2FAST_POINTER(Result, kernel, arguments) Result(*kernel) arguments;
struct OpKernels {
    GPT2FAST_OP_KERNELS(GPT2FAST_POINTER)
};
struct StepKernels {
    GPT2FAST_STEP_KERNELS(GPT2FAST_POINTER)
};
#undef GPT2FAST_POINTER

// What a file of isa/ compiles. Instruction sets that differ in products of integers alone share
// the kernels of ops.
struct KernelTable {
    const char* name;  // of the instruction set
    const OpKernels* ops;
    StepKernels step;
};

struct Kernels : OpKernels, StepKernels {
    const char* name;  // of the instruction set
};

// The kernels of the best instruction set that this processor has, or of the one that the
// environment variable GPT2FAST_ISA names. Throws std::runtime_error if that one cannot run here.
const Kernels& kernels();

}  // namespace gpt2fast
