// The step for AVX2 with AVX-VNNI, which sums products of bytes.
#include "compiler.h"
#ifdef GPT2FAST_HAS_AVX_VNNI
#define GPT2FAST_ISA avx2_vnni
#define GPT2FAST_SIMD "simd/avx2.h"
#define GPT2FAST_TARGET "avx2,fma,f16c,avxvnni"
#define GPT2FAST_AVX_VNNI
#define GPT2FAST_OPS_OF avx2
#include "../kernel_table.h"
#endif
