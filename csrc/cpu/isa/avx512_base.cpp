// Every kernel for AVX-512 without instructions that sum products of bytes.
#if defined(__x86_64__)
#define GPT2FAST_ISA avx512_base
#define GPT2FAST_SIMD "simd/avx512.h"
#define GPT2FAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define GPT2FAST_WITHOUT_VNNI
#include "../kernel_table.h"
#endif
