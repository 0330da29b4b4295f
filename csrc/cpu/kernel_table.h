// All kernels, compiled for one instruction set, and their table. A file of isa/ names the
// instruction set (GPT2FAST_ISA), the header of its vectors (GPT2FAST_SIMD) and, unless the
// compiler may use it everywhere, what to switch on (GPT2FAST_TARGET), then includes this. With
// GPT2FAST_STEP_OF only the step is compiled; all other kernels are those of the table it names.
#include "prelude.h"

#define GPT2FAST_PRAGMA(text) _Pragma(#text)
#define GPT2FAST_STRING_(text) #text
#define GPT2FAST_STRING(text) GPT2FAST_STRING_(text)
#define GPT2FAST_TABLE_(isa) kernels_##isa
#define GPT2FAST_TABLE(isa) GPT2FAST_TABLE_(isa)

#if defined(GPT2FAST_TARGET) && defined(__clang__)
#define GPT2FAST_SWITCH_ON(sets) \
    GPT2FAST_PRAGMA(clang attribute push(__attribute__((target(sets))), apply_to = function))
GPT2FAST_SWITCH_ON(GPT2FAST_TARGET)
#elif defined(GPT2FAST_TARGET)
#pragma GCC push_options
#define GPT2FAST_SWITCH_ON(sets) GPT2FAST_PRAGMA(GCC target(sets))
GPT2FAST_SWITCH_ON(GPT2FAST_TARGET)
#endif

#include GPT2FAST_SIMD

#include "simd/math.h"

#include "decode.h"
#ifndef GPT2FAST_STEP_OF
#include "attention_backward.h"
#include "cache.h"
#include "cached_attention.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "gemm.h"
#include "layer_norm.h"
#include "matmul.h"
#include "mlp.h"
#include "optimizer.h"
#include "sampling.h"
#endif

namespace gpt2fast {

#ifdef GPT2FAST_STEP_OF
extern const Kernels GPT2FAST_TABLE(GPT2FAST_STEP_OF);
extern const StepKernels GPT2FAST_TABLE(GPT2FAST_ISA);
const StepKernels GPT2FAST_TABLE(GPT2FAST_ISA) = {GPT2FAST_STRING(GPT2FAST_ISA),
                                                  &GPT2FAST_TABLE(GPT2FAST_STEP_OF),
                                                  GPT2FAST_ISA::step, GPT2FAST_ISA::step_workspace};
#else
extern const Kernels GPT2FAST_TABLE(GPT2FAST_ISA);
const Kernels GPT2FAST_TABLE(GPT2FAST_ISA) = {GPT2FAST_STRING(GPT2FAST_ISA),
#define GPT2FAST_ENTRY(Result, kernel, arguments) GPT2FAST_ISA::kernel,
                                              GPT2FAST_KERNELS(GPT2FAST_ENTRY)
#undef GPT2FAST_ENTRY
};
#endif

}  // namespace gpt2fast

#if defined(GPT2FAST_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(GPT2FAST_TARGET)
#pragma GCC pop_options
#endif
