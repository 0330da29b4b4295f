// Every kernel for AVX-512.
#if defined(__x86_64__)
#define GPT2FAST_ISA avx512
#define GPT2FAST_SIMD "simd/avx512.h"
#define GPT2FAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#include "../kernel_table.h"
#endif
