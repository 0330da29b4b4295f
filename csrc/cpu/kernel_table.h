// All kernels, compiled for one instruction set, and their table. A file of isa/ names the
// instruction set (GPT2FAST_ISA), the header of its vectors (GPT2FAST_SIMD) and, unless the
// compiler may use it everywhere, what to switch on (GPT2FAST_TARGET), then includes this. With
// GPT2FAST_OPS_OF only the step is compiled; the ops' kernels are those of the set named there.
#include "prelude.h"

#define GPT2FAST_PRAGMA(text) _Pragma(#text)
#define GPT2FAST_STRING_(text) #text
#define GPT2FAST_STRING(text) GPT2FAST_STRING_(text)
#define GPT2FAST_JOIN_(prefix, isa) prefix##isa
#define GPT2FAST_JOIN(prefix, isa) GPT2FAST_JOIN_(prefix, isa)

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

#ifndef GPT2FAST_OPS_OF
#include "attention_backward.h"
#include "cache.h"
#include "cached_attention.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "layer_norm.h"
#include "matmul.h"
#include "mlp.h"
#include "optimizer.h"
#include "sampling.h"
#endif

namespace gpt2fast {

#define GPT2FAST_ENTRY(Result, kernel, arguments) GPT2FAST_ISA::kernel,
#ifdef GPT2FAST_OPS_OF
extern const OpKernels GPT2FAST_JOIN(ops_, GPT2FAST_OPS_OF);
#else
#define GPT2FAST_OPS_OF GPT2FAST_ISA
extern const OpKernels GPT2FAST_JOIN(ops_, GPT2FAST_ISA);
const OpKernels GPT2FAST_JOIN(ops_, GPT2FAST_ISA) = {GPT2FAST_OP_KERNELS(GPT2FAST_ENTRY)};
#endif
extern const KernelTable GPT2FAST_JOIN(kernels_, GPT2FAST_ISA);
const KernelTable GPT2FAST_JOIN(kernels_, GPT2FAST_ISA) = {GPT2FAST_STRING(GPT2FAST_ISA),
                                                           &GPT2FAST_JOIN(ops_, GPT2FAST_OPS_OF),
                                                           {GPT2FAST_STEP_KERNELS(GPT2FAST_ENTRY)}};
#undef GPT2FAST_ENTRY

}  // namespace gpt2fast

#if defined(GPT2FAST_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(GPT2FAST_TARGET)
#pragma GCC pop_options
#endif
