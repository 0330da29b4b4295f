// The step for AVX-512 with VNNI, which sums products of bytes.
#if defined(__x86_64__)
#define GPT2FAST_ISA avx512
#define GPT2FAST_SIMD "simd/avx512.h"
#define GPT2FAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define GPT2FAST_OPS_OF avx512_base
#include "../kernel_table.h"
#endif
