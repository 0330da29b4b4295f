// All kernels, compiled for the instruction set GPT2FAST_ISA, and their table.
#include "simd/math.h"

#include "decode.h"
#include "gemm.h"
#include "mlp.h"

#define GPT2FAST_NAME_(isa) #isa
#define GPT2FAST_NAME(isa) GPT2FAST_NAME_(isa)
#define GPT2FAST_TABLE_(isa) kernels_##isa
#define GPT2FAST_TABLE(isa) GPT2FAST_TABLE_(isa)

namespace gpt2fast {

extern const Kernels GPT2FAST_TABLE(GPT2FAST_ISA);
const Kernels GPT2FAST_TABLE(GPT2FAST_ISA) = {
    GPT2FAST_NAME(GPT2FAST_ISA),
    GPT2FAST_ISA::bias_gelu,
    GPT2FAST_ISA::step,
    GPT2FAST_ISA::step_workspace,
};

}  // namespace gpt2fast
