// All kernels, compiled for the instruction set GPT2FAST_ISA, and their table.
#include "simd/math.h"

#include "attention_backward.h"
#include "cache.h"
#include "cached_attention.h"
#include "cross_entropy.h"
#include "decode.h"
#include "embedding.h"
#include "gemm.h"
#include "layer_norm.h"
#include "mlp.h"
#include "optimizer.h"
#include "matmul.h"
#include "sampling.h"

#define GPT2FAST_NAME_(isa) #isa
#define GPT2FAST_NAME(isa) GPT2FAST_NAME_(isa)
#define GPT2FAST_TABLE_(isa) kernels_##isa
#define GPT2FAST_TABLE(isa) GPT2FAST_TABLE_(isa)

namespace gpt2fast {

extern const Kernels GPT2FAST_TABLE(GPT2FAST_ISA);
const Kernels GPT2FAST_TABLE(GPT2FAST_ISA) = {
    // clang-format off
    GPT2FAST_NAME(GPT2FAST_ISA),
    GPT2FAST_ISA::bias_gelu,
    GPT2FAST_ISA::bias_gelu_backward,
    GPT2FAST_ISA::add_blocks,
    GPT2FAST_ISA::matmul_pays,
    GPT2FAST_ISA::matmul_plan,
    GPT2FAST_ISA::matmul_pack,
    GPT2FAST_ISA::matmul,
    GPT2FAST_ISA::layer_norm,
    GPT2FAST_ISA::layer_norm_backward,
    GPT2FAST_ISA::attention,
    GPT2FAST_ISA::attention_backward,
    GPT2FAST_ISA::cross_entropy,
    GPT2FAST_ISA::adamw,
    GPT2FAST_ISA::embedding,
    GPT2FAST_ISA::embedding_backward,
    GPT2FAST_ISA::cached_attention,
    GPT2FAST_ISA::append_to_cache,
    GPT2FAST_ISA::reorder_cache,
    GPT2FAST_ISA::sample,
    GPT2FAST_ISA::sample_workspace,
    GPT2FAST_ISA::step,
    GPT2FAST_ISA::step_workspace,
    // clang-format on
};

}  // namespace gpt2fast
