// Every kernel for AVX-512 with dot products of bfloat16.
#if defined(__x86_64__)
#define GPT2FAST_ISA avx512_bf16
#define GPT2FAST_SIMD "simd/avx512.h"
#define GPT2FAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
#define GPT2FAST_AVX512_BF16
#include "../kernel_table.h"
#endif
