// The step for AArch64 with dot products of unsigned and signed bytes (Armv8.6).
#include "compiler.h"
#ifdef GPT2FAST_HAS_NEON_DOTS
#define GPT2FAST_ISA neon_i8mm
#define GPT2FAST_SIMD "simd/neon.h"
#define GPT2FAST_TARGET "arch=armv8.2-a+dotprod+i8mm"
#define GPT2FAST_NEON_I8MM
#define GPT2FAST_OPS_OF neon
#include "../kernel_table.h"
#endif
