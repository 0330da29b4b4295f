// Every kernel for AVX2.
#if defined(__x86_64__)
#define GPT2FAST_ISA avx2
#define GPT2FAST_SIMD "simd/avx2.h"
#define GPT2FAST_TARGET "avx2,fma,f16c"
#include "../kernel_table.h"
#endif
