// The step for AVX-512 with AMX.
#include "compiler.h"

#ifdef GPT2FAST_HAS_AMX
#define GPT2FAST_ISA avx512_amx
#define GPT2FAST_SIMD "simd/avx512.h"
#define GPT2FAST_TARGET                                                 \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma" \
    ",f16c,amx-tile,amx-int8,amx-bf16"
#define GPT2FAST_AVX512_BF16
#define GPT2FAST_AMX
#define GPT2FAST_OPS_OF avx512_bf16
#include "../kernel_table.h"
#endif
